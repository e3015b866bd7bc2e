"""A run on several Ray nodes. In a pytest call of its own: two clusters in one process break Ray's state API."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from service.base_models import BUNDLED
from service.config import load_run
from service.domain import ModelRef, RunState
from service.kuberay.manifests import MOUNT, Pods, manifests
from service.registry import Registry
from service.runs import Run, list_runs
from service.settings import Settings
from service.training.checkpoint import newest_step
from tests.integration import small_runs
from tests.integration.place import DEADLINE_S, ROOT, Place, wait_until

pytestmark = pytest.mark.long
# What a pod's preStop hook does, for a node that is named: here several nodes are on one machine.
LEAVE = """
import sys
from service import launcher
launcher.connect()
from jobs.leave import leave
print("idle:", leave(sys.argv[1], 100.0))
"""

# The end of a RayJob's attempt, which wants as many pods as have ever joined; the youngest is ready in so many seconds.
STAY = """
import os, sys, time
from rich.console import Console
from jobs import ending
starts = next(ending._starts())
ending.READY_S = time.time() - max(starts) + float(sys.argv[1])
if sys.argv[2] == "pod":
    os.environ[ending.WORKER_PODS] = str(len(starts))
ending.stay_until_seen(Console())
print("over")
"""


def add_node(cluster: Any, number: int) -> Any:
    """With an address of its own: a driver attaches itself to a node of its address, which must be the head's."""
    return cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number}")


@pytest.fixture(scope="module")
def nodes(ray_environment: dict[str, str]) -> Iterator[Any]:
    """A head that does no work, and two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    directory = tempfile.mkdtemp(prefix="lr-", dir="/tmp")
    Path(directory).with_name("ray").mkdir(exist_ok=True)  # Cluster writes its address there whatever temp_dir is
    # The state API needs the dashboard: without it Ray Train's placement groups leak.
    head = {"num_cpus": 0, "include_dashboard": True, "temp_dir": directory, "dashboard_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.workers = [add_node(cluster, number) for number in (2, 3)]
    yield cluster
    cluster.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def place(nodes: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    base = small_runs.small_base(tmp_path_factory.mktemp("base"))
    run_file = small_runs.write_run_file(
        tmp_path / "run", base, scale={"workers": 2}, checkpoint={"every": {"steps": 5}}
    )
    settings = Settings(str(tmp_path / "home"), tmp_path / "cache")
    environment = {
        **os.environ,
        "LORAY_HOME": settings.home,
        "LORAY_CACHE": str(settings.cache),
        "RAY_ADDRESS": nodes.address,
    }
    return Place("", settings, environment, run_file)


@contextmanager
def node_with_a_directory_of_its_own(nodes: Any, home: Path) -> Iterator[None]:
    """A node of one CPU that has an empty file system where the others have `home`: a mount that nobody else sees."""
    home.mkdir(parents=True)
    script = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
    if subprocess.run(["unshare", "-m", "bash", "-c", script, str(home), "true"], check=False).returncode:
        pytest.skip("mounting needs root, or a container that may")
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--address", nodes.address, "--num-cpus", "1", "--block"]
    command = ["unshare", "-m", "bash", "-c", script, str(home), *ray, "--node-ip-address", "127.0.0.9"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as node:
        try:
            yield
        finally:
            node.terminate()


def workers(run: Run) -> int:
    return int(run.status().details.get("workers", 0))


def metrics_of_attempt(run: Run, attempt: int) -> bool:
    from service import storage

    return any(name.startswith(f"a{attempt}-r0") for name in storage.list_names(run.path("metrics")))


def test_workers_on_two_nodes_train_together(place: Place) -> None:
    place.train(str(place.run_file))
    run = place.newest()
    assert run.status().state is RunState.SUCCEEDED
    places = {
        event["text"].split(" on ")[1].split(", process")[0] for event in run.events() if event["kind"] == "worker"
    }
    assert len(places) == 2, places  # each worker on a Ray node of its own


def test_a_home_that_a_node_does_not_share_is_told_with_what_to_set(place: Place, nodes: Any) -> None:
    with node_with_a_directory_of_its_own(nodes, Path(place.settings.home)):
        output = place.train(str(place.run_file), "--set", "scale.workers=3", expect=1)
    assert (
        "does not find the run in LORAY_HOME" in output and "an s3:// URI, or to a directory that every node" in output
    )
    assert place.newest().status().state is RunState.FAILED


def test_a_run_shrinks_when_a_node_goes_and_grows_when_one_comes_and_loses_no_draw(
    place: Place, nodes: Any, tmp_path: Path
) -> None:
    elastic = ("--set", "scale.workers={min: 1, max: 2}", "--set", "optim.epochs=5000")
    log = tmp_path / "driver.log"
    with log.open("w") as out, subprocess.Popen(
        [sys.executable, "-m", "jobs.train", str(place.run_file), *elastic],
        env=place.environment, cwd=ROOT, stdout=out, stderr=out,
    ) as process:  # fmt: skip
        try:
            wait_until(lambda: process.poll() is not None or bool(list_runs(place.settings.home)), "the run exists")
            run = place.newest()
            wait_until(lambda: process.poll() is not None or metrics_of_attempt(run, 1), "it trains")
            assert workers(run) == 2
            nodes.remove_node(nodes.workers.pop(), allow_graceful=False)
            wait_until(lambda: metrics_of_attempt(run, 2) and workers(run) == 1, "it goes on with one worker")
            nodes.workers.append(add_node(nodes, 3))
            wait_until(lambda: metrics_of_attempt(run, 3) and workers(run) == 2, "it goes on with two workers again")
            place.loray("runs", "stop", run.id)
            assert process.wait(timeout=120) == 0
        except AssertionError as error:
            error.add_note(log.read_text()[-3000:])
            raise
        finally:
            process.kill()
    assert run.status().state is RunState.STOPPED
    check = json.loads(place.loray("runs", "ledger", run.id, "--check", "--json"))
    assert check["steps"] == run.status().step


def test_a_run_leaves_a_node_that_is_announced_to_go_before_it_goes(place: Place, nodes: Any) -> None:
    elastic = ("--set", "scale.workers={min: 1, max: 2}", "--set", "optim.epochs=5000")
    command = [sys.executable, "-m", "jobs.train", str(place.run_file), *elastic]
    with subprocess.Popen(command, env=place.environment, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: process.poll() is not None or bool(list_runs(place.settings.home)), "the run exists")
            run = place.newest()
            wait_until(lambda: process.poll() is not None or metrics_of_attempt(run, 1), "it trains")
            assert workers(run) == 2
            assert place.run(sys.executable, "-c", LEAVE, nodes.workers[-1].node_id).endswith("idle: True\n")
            wait_until(lambda: metrics_of_attempt(run, 2) and workers(run) == 1, "it goes on with one worker")
            place.loray("runs", "stop", run.id)
            assert process.wait(timeout=120) == 0
        finally:
            process.kill()
    assert run.status().state is RunState.STOPPED
    check = json.loads(place.loray("runs", "ledger", run.id, "--check", "--json"))
    assert check["steps"] == run.status().step


def doctor(place: Place, timeout_s: float = 120.0) -> list[dict[str, Any]]:
    """What it finds; its exit status says whether all is good."""
    script = f"import service.doctor as d, jobs.doctor as j; d.ANSWER_TIMEOUT_S = {timeout_s}; exit(j.main(['--json']))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=place.environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip(), done.stderr[-3000:]
    checks: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.returncode == int(not all(check["ok"] for check in checks)), done.stderr[-3000:]
    return checks


def test_a_head_without_a_gpu_is_no_problem_of_a_gpu_cluster_and_the_backend_that_was_used_is_named(
    place: Place, nodes: Any
) -> None:
    gpus = [nodes.add_node(num_cpus=1, num_gpus=1, node_ip_address=f"127.0.0.{number}") for number in (11, 12)]
    try:
        checks = [check for check in doctor(place) if check["name"] == "collectives"]
    finally:
        for node in gpus:
            nodes.remove_node(node)
    (check,) = checks  # of the two nodes with a GPU
    if torch.cuda.is_available():
        assert check["ok"] and "(nccl)" in check["found"]
    else:  # Ray counts GPUs that are not there
        assert "(gloo)" in check["found"] and not check["ok"] and "torch cannot use" in check["remedy"]


def test_a_node_that_does_not_answer_is_a_problem_with_its_name(place: Place, nodes: Any) -> None:
    silent = add_node(nodes, 13)
    raylet = silent.all_processes["raylet"][0].process
    raylet.send_signal(signal.SIGSTOP)
    try:
        checks = doctor(place, timeout_s=8.0)  # it is declared dead after some 30 s
    finally:
        raylet.send_signal(signal.SIGCONT)
        nodes.remove_node(silent)
    (problem,) = [check for check in checks if check["name"] == "answer"]
    assert silent.node_id[:6] in problem["where"] and problem["found"] == "no answer within 8 s" and problem["remedy"]
    assert sum(check["name"] == "versions" for check in checks) >= 2  # the others have answered


def test_an_attempt_does_not_end_before_its_pods_are_ready(place: Place, nodes: Any) -> None:
    def printed(ready_in_s: float, where: str) -> list[str]:
        command = [sys.executable, "-c", STAY, str(ready_in_s), where]
        done = subprocess.run(
            command, env=place.environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    waited = printed(10.0, "pod")
    assert waited[0].startswith("Waiting for the worker pods") and waited[-1] == "over"
    assert printed(-1.0, "pod") == ["over"], "they have been ready for long"
    assert printed(3600.0, "elsewhere") == ["over"], "this is no pod"


def submitted(place: Place, nodes: Any, job: dict[str, Any], attempt: int) -> subprocess.Popen[str]:
    """A RayJob's entrypoint, by the very line that the operator makes for the shell of its submitter."""
    spec, directory = job["spec"], place.run_file.parent / "config-map"
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    environment["env_vars"] |= {name: place.environment[name] for name in ("LORAY_HOME", "LORAY_CACHE", "PYTHONPATH")}
    address = f"http://{nodes.head_node.address_info['webui_url']}"
    quoted = json.dumps(json.dumps(environment))
    entrypoint = spec["entrypoint"].replace(str(MOUNT), str(directory))
    line = f"ray job submit --address {address} --runtime-env-json {quoted} --submission-id attempt-{attempt} -- {entrypoint} ;"
    path = f"{Path(sys.executable).parent}{os.pathsep}{place.environment['PATH']}"
    return subprocess.Popen(
        ["/bin/bash", "-ce", "--", line], env={**place.environment, "PATH": path}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.longer  # and alone: the tests before leave the cluster with fewer nodes
def test_a_rayjobs_entrypoint_trains_and_its_next_attempt_goes_on(place: Place, nodes: Any) -> None:
    """The first attempt is stopped in the middle, as by a head that goes; the operator then starts the same once more."""
    bundled, base = (
        next(iter(BUNDLED)),
        load_run(str(place.run_file)).config.model.id,
    )  # pods would not find the small base
    long = load_run(str(place.run_file), ["optim.epochs=200", "publish=small", f"model={bundled}"])
    run_id = "20260101-000000-small-0001"
    config_map, _, job = manifests(long, run_id, Pods(1, 1, 1, 1, 0, 4, 2, 10, 10))
    directory = place.run_file.parent / "config-map"
    directory.mkdir()
    for name, text in config_map["data"].items():
        (directory / name).write_text(text.replace(str(MOUNT), str(directory)).replace(bundled, base))
    run = Run(place.settings.home, run_id)
    with submitted(place, nodes, job, 1) as first:
        try:
            wait_until(lambda: first.poll() is not None or (newest_step(run.uri) or 0) >= 5, "there is a checkpoint")
            run.request_stop("its head goes")
            output, _ = first.communicate(timeout=DEADLINE_S)
        finally:
            first.kill()
    assert first.returncode == 0, output
    assert run.status().state is RunState.STOPPED, output
    reached = run.status().step
    with submitted(place, nodes, job, 2) as second:
        output, _ = second.communicate(timeout=2 * DEADLINE_S)
    assert second.returncode == 0, output
    assert (run.status().state, run.status().details["attempt"]) == (RunState.SUCCEEDED, 2)
    assert reached is not None and reached > 0
    assert any(event["kind"] == "resumed" for event in run.events())
    assert Registry(place.settings.home).manifest(ModelRef.parse("small@1")).run == run_id
