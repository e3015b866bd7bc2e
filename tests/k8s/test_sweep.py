"""The sweep that a RayJob carries: its files load as `jobs.sweep` loads them, and its trials fit the pods."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.sweep import parsed
from service.runs import check_id
from tests.k8s.conftest import K8S, Build
from tests.k8s.objects import cluster_spec, of_kind
from tune.sweep_file import load_sweep

DIRECTORIES = {"base": K8S / "base" / "sweep", "local-cpu": K8S / "overlays" / "local-cpu" / "sweep"}
MOUNT = "/etc/loray/run/"


@pytest.mark.parametrize("name", DIRECTORIES)
def test_the_embedded_sweep_loads_and_its_trials_fit_the_pods(name: str, build: Build, tmp_path: Path) -> None:
    documents = build(DIRECTORIES[name])
    (config_map,), (job,) = of_kind(documents, "ConfigMap"), of_kind(documents, "RayJob")
    for file, text in config_map["data"].items():
        (tmp_path / file).write_text(text)
    python, option, module, *arguments = job["spec"]["entrypoint"].split()
    assert (python, option, module) == ("python", "-m", "jobs.sweep")
    given = parsed(arguments)
    file = given.sweep_file
    assert file.startswith(MOUNT) and given.sweep_id_file.startswith(MOUNT)
    check_id((tmp_path / given.sweep_id_file.removeprefix(MOUNT)).read_text().strip())
    sweep = load_sweep(str(tmp_path / file.removeprefix(MOUNT)))
    draws = sweep.known_draws
    assert draws and len(draws) == sweep.num_trials
    (group,) = cluster_spec(job)["workerGroupSpecs"]
    for number, draw in enumerate(draws):
        assert sweep.trial(f"trial-{number}", draw, {}).config.scale.min_workers <= group["replicas"]
    head = cluster_spec(job)["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
    assert int(head.removesuffix("Gi")) >= 2 + 2 * group["replicas"], "all drivers of trials are on the head"
    assert job["spec"]["backoffLimit"] == 3, "a second attempt goes on with the same sweep"
