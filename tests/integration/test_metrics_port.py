"""A run's figures on the metrics port of a real Ray node, under the names that dashboards and alerts ask for."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from service.runs import Run
from service.training.exported import COUNTERS, GAUGES, Exported
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
    exported = Exported(run, "support", 40, seconds=lambda: now)
    exported.take([{"step": 7, "train/tokens_per_s": 123.0}])
    run.heartbeat(attempt=2)
    now = 1010.0
    (tmp_path / "runs" / run.id / "events").mkdir(parents=True)
    (tmp_path / "runs" / run.id / "events" / "a1-r0-000000.jsonl").write_text("no JSON\n")
    exported.take([])
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}
    wait_until(lambda: wanted <= set(_on_the_port(url, run.id)), "Ray's agent shows them", 60.0, every_s=0.5)
    shown = _on_the_port(url, run.id)
    assert shown["ray_loray_train_step"] == 7
    assert shown["ray_loray_train_gpu_seconds_total"] == 40.0  # two times ten seconds with two GPUs
    assert shown["ray_loray_train_storage_failures_total"] == 1
