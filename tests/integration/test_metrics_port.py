"""A run's figures on the metrics port of a real Ray node, under the names that dashboards and alerts ask for."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from service.runs import Run
from service.training.exported import AWAY, COUNTERS, GAUGES, Exported, StorageAway
from tests.integration.waiting import wait_until


def _on_the_port(url: str, run: str) -> dict[str, float]:
    """Every series of this run, by name."""
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - the node's own http URL
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = (sample for family in families for sample in family.samples)
    return {sample.name: sample.value for sample in samples if sample.labels.get("run") == run}


def test_a_node_shows_every_figure_of_a_run(ray_cluster: str, tmp_path: Path) -> None:
    import ray

    run = Run.create(str(tmp_path), "small", "", {})
    run.heartbeat(attempt=1, workers=2, gpus=2)
    now = 1000.0
    exported = Exported(run, "support", 40, 1, seconds=lambda: now)
    away = StorageAway(run.id, "support", "3")
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def shows(name: str, value: float) -> None:
        wait_until(lambda: _on_the_port(url, run.id).get(name) == value, f"{name} is {value:g}", 60.0, every_s=0.5)

    with exported.showing(), away.showing():
        shows("ray_loray_train_restarts", 0.0)  # before anything has happened
        shows(f"ray_{AWAY}", 0.0)
        exported.take([{"step": 7, "train/tokens_per_s": 123.0}])
        run.heartbeat(attempt=2)
        now = 1010.0
        exported.take([])
        away.heard("storage_away", "reading data")
        shows(f"ray_{AWAY}", 1.0)
        shows("ray_loray_train_restarts", 1.0)
        shows("ray_loray_train_step", 7.0)
        shows("ray_loray_train_gpu_seconds_total", 40.0)  # two times ten seconds with two GPUs
        wanted = {f"ray_{name}" for name in (*GAUGES, AWAY)} | {f"ray_{name}_total" for name in COUNTERS}
        assert wanted <= set(_on_the_port(url, run.id))
