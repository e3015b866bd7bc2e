"""A run file as a RayJob: what is rendered, and what `loray train --kuberay` creates, follows and tells."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.base_models import BUNDLED
from service.cli.app import main
from service.config import ResolvedRun, load_run
from service.errors import ClusterError, ConfigError
from service.kuberay import api as kuberay_api
from service.kuberay.manifests import Manifest, Pods, as_yaml, job_name, manifests, size_pods
from service.runs import Run
from service.training.memory import MemoryPlan
from tests.integration.small_runs import write_run_file
from tests.k8s import operator_rules, references, schemas, security
from tests.k8s.conftest import K8S, Build
from tests.k8s.kubernetes_api import FakeApi, serving
from tests.k8s.network import End, allowed
from tests.k8s.objects import cluster_spec, of_kind
from tests.k8s.objects import pods as pods_of

RUN_ID = "20261127-101500-tickets.v2-0a1b"
GIB = 2**30
PODS = Pods(least=1, most=2, workers=8, cpus=64, gpus=8, memory_gib=200, shared_gib=64, cache_gib=60, head_cache_gib=30)
ON_GPU = MemoryPlan("cuda", {}, {"train": 60 * GIB}, 10 * GIB, 1, 4096, 2048)
ON_CPU = MemoryPlan("cpu", {}, {"train": 2 * GIB, "save": GIB}, 0, 1, 512, 256)


def resolved(directory: Path, *overrides: str, **blocks: Any) -> ResolvedRun:
    """A run file with one row of data beside it, whose text tries to get into a shell."""
    directory.mkdir(exist_ok=True)
    (directory / "rows.jsonl").write_text('{"prompt": "$(reboot) `id`; \\"", "completion": "é"}\n')
    values = {"model": "base", "data": {"train": str(directory / "rows.jsonl")}, **blocks}
    (directory / "run.yaml").write_text(yaml.safe_dump(values))
    return load_run(str(directory / "run.yaml"), overrides)


def rendered(run: ResolvedRun, pods: Pods = PODS) -> dict[str, Manifest]:
    """The objects by kind."""
    return {document["kind"]: document for document in manifests(run, RUN_ID, pods)}


def test_the_template_filled_in_is_valid_safe_and_one_run_s_own(
    tmp_path: Path, build: Build, crds: dict[str, Any]
) -> None:
    documents = list(rendered(resolved(tmp_path)).values())
    job = of_kind(documents, "RayJob")[0]
    assert [line for d in documents for line in schemas.problems(d, crds)] == []
    assert operator_rules.problems(job) == []
    assert security.problems([*build(K8S / "base"), *documents]) == []
    (policy,) = of_kind(documents, "NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"] == {"loray.io/run": job["metadata"]["name"]}
    for group in (cluster_spec(job)["headGroupSpec"], cluster_spec(job)["workerGroupSpecs"][0]):
        assert group["template"]["metadata"]["labels"]["loray.io/run"] == job["metadata"]["name"]


def test_sizes_places_and_image_are_the_run_files(tmp_path: Path) -> None:
    block = {
        "namespace": "team",
        "gpus": 8,
        "nodes": {"zone": "a"},
        "image": "registry/loray:1",
        "retries": 1,
        "deadline_s": 60,
    }
    job = rendered(resolved(tmp_path, kubernetes=block))["RayJob"]
    (group,) = cluster_spec(job)["workerGroupSpecs"]
    pod = group["template"]["spec"]
    assert (job["metadata"]["namespace"], job["spec"]["backoffLimit"], job["spec"]["activeDeadlineSeconds"]) == (
        "team",
        1,
        60,
    )
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 1, 2)
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "64", "memory": "200Gi", "nvidia.com/gpu": "8"}
    assert group["rayStartParams"]["object-store-memory"] == str(32 * GIB), "half of /dev/shm"
    assert pod["nodeSelector"] == {"zone": "a"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert pod["containers"][0]["image"] == "registry/loray:1"
    head = cluster_spec(job)["headGroupSpec"]["template"]["spec"]
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    disks = [
        (spec["containers"][0]["resources"]["requests"]["ephemeral-storage"], volume["emptyDir"]["sizeLimit"])
        for spec in (head, pod) for volume in spec["volumes"] if volume["name"] == "cache"
    ]  # fmt: skip
    assert disks == [("35Gi", "30Gi"), ("65Gi", "60Gi")]
    assert {"name": "LORAY_WORKER_PODS", "value": "1"} in head["containers"][0]["env"], "as many as replicas"
    assert job["spec"]["preRunningDeadlineSeconds"] == 1800 + 600, "longer than the driver waits for workers"


def test_a_run_in_a_namespace_of_its_own_finds_all_it_names_there(tmp_path: Path, build: Build) -> None:
    run = list(rendered(resolved(tmp_path, kubernetes={"namespace": "team"})).values())
    classes = of_kind(build(K8S / "base"), "PriorityClass")  # of the whole cluster
    documents = [*build(K8S / "overlays" / "team"), *classes, *run]
    secrets = {"loray-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}, "loray-hub": {"token"}}
    assert references.problems(documents, secrets) == []
    groups = [of_kind(build(K8S / d), "RoleBinding")[0]["subjects"][0]["name"] for d in ("base", "overlays/team")]
    assert groups == ["loray-users", "team-users"], "a team may create RayJobs in its namespace only"
    assert security.problems(documents) == []
    head, worker = (End(pod.labels, "team") for pod in pods_of(run))
    assert allowed(documents, head, worker, 43210)
    assert allowed(documents, head, End({}, address="52.216.0.1"), 443)
    assert allowed(documents, End({}, "kuberay-system"), head, 8265)
    assert not allowed(documents, End({}, "loray"), head, 8265)


def test_a_queue_makes_the_job_wait_as_the_operator_allows(tmp_path: Path) -> None:
    job = rendered(resolved(tmp_path, kubernetes={"queue": "team"}))["RayJob"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["spec"]["suspend"] is True
    assert operator_rules.problems(job) == []


def test_nothing_of_a_users_is_outside_of_the_config_map(tmp_path: Path) -> None:
    run = resolved(tmp_path, "optim.lr=0.003", publish="tickets.v2")
    documents = rendered(run)
    entrypoint = documents["RayJob"]["spec"]["entrypoint"]
    template = yaml.safe_load((K8S / "base" / "train" / "ray-job.yaml").read_text())
    assert entrypoint == template["spec"]["entrypoint"]
    assert shlex.split(entrypoint) == entrypoint.split(), "a shell reads nothing into it"
    assert documents["RayJob"]["spec"]["runtimeEnvYAML"] == template["spec"]["runtimeEnvYAML"]
    data = documents["ConfigMap"]["data"]
    assert data["run-id"] == f"{RUN_ID}\n"
    assert data["train-rows.jsonl"] == (tmp_path / "rows.jsonl").read_text()
    text = json.dumps(documents["RayJob"])
    assert "reboot" not in text and "0.003" not in text


def test_the_run_file_that_travels_says_the_same_with_its_data_where_it_lies_there(tmp_path: Path) -> None:
    run = resolved(tmp_path, "optim.lr=0.003", "method=qlora", scale={"workers": {"min": 1, "max": 4}})
    (tmp_path / "there.yaml").write_text(rendered(run)["ConfigMap"]["data"]["run.yaml"])
    there = load_run(str(tmp_path / "there.yaml")).config
    assert there.data.train == "/etc/loray/run/train-rows.jsonl"
    assert there == run.config.model_copy(
        update={"data": run.config.data.model_copy(update={"train": there.data.train})}
    )


def test_a_run_file_without_local_data_travels_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# mine\nmodel: org/base\ndata: {train: 's3://bucket/rows.jsonl'}\n")
    run = load_run(str(tmp_path / "run.yaml"))
    assert rendered(run)["ConfigMap"]["data"]["run.yaml"] == run.text


def test_data_that_a_config_map_does_not_hold_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run = resolved(tmp_path)
    (tmp_path / "rows.jsonl").write_text("x" * 1_150_000)
    with pytest.raises(ConfigError, match=r"1\.1 MiB to carry, a ConfigMap holds 1 MiB.*s3://"):
        rendered(run)


@pytest.mark.parametrize(
    "data", ['{"a": 1}\n{"b": 2}\n', "a\n  b \n\tc\n", "no newline", "é\u2028\x07\r\n", "- x: *y\n"]
)
def test_what_is_printed_reads_back_the_same_and_files_stand_line_by_line(data: str, tmp_path: Path) -> None:
    documents = [*rendered(resolved(tmp_path)).values()]
    documents[0]["data"]["rows.jsonl"] = data
    printed = as_yaml(documents)
    assert list(yaml.safe_load_all(printed)) == documents
    assert "\n  run.yaml: |\n" in printed
    assert not any(word.startswith(("&", "*")) for word in printed.replace('"', " ").split() if word != "*y")


@pytest.mark.parametrize("run_id", ["20261127-101500-a-0a1b", f"20261127-101500-{'very_long.name-' * 3}x-0a1b", RUN_ID])
def test_the_name_of_a_run_becomes_one_that_the_operator_takes(run_id: str) -> None:
    name = job_name(run_id)
    assert len(name) <= 47 and operator_rules.NAME.fullmatch(name) and name.endswith("-0a1b")
    assert job_name("20261127-101500-b-0a1b") != job_name("20261127-101500-a-0a1b")


def test_pods_hold_as_many_workers_as_gpus_and_the_memory_of_the_plan(tmp_path: Path) -> None:
    run = resolved(tmp_path, kubernetes={"gpus": 8, "cpus": 4}, scale={"workers": {"min": 8, "max": 20}})
    pods = size_pods(run, ON_GPU, trainable_bytes=0, base_bytes=14 * GIB)
    assert (pods.least, pods.most, pods.workers, pods.cpus) == (1, 3, 8, 32)
    assert pods.memory_gib == 1 + 8 * (10 + 3) + pods.shared_gib
    assert pods.cache_gib == 10 + 3 * 14
    full = size_pods(run, ON_GPU, trainable_bytes=28 * GIB, base_bytes=14 * GIB)
    assert full.cache_gib == 10 + 3 * 14 + 3 * 28, "a node fetches the whole checkpoint"
    run = resolved(tmp_path, kubernetes={"gpus": 8}, scale={"workers": 8, "strategy": "zero3", "offload": "optimizer"})
    offloaded = size_pods(run, ON_GPU, trainable_bytes=80 * GIB, base_bytes=14 * GIB)
    assert offloaded.memory_gib == 1 + 8 * (10 + 3 * 80 // 8 + 3) + offloaded.shared_gib
    run = resolved(tmp_path, scale={"workers": 3})
    on_cpus = size_pods(run, ON_CPU, trainable_bytes=GIB, base_bytes=GIB)
    assert (on_cpus.least, on_cpus.most, on_cpus.gpus) == (3, 3, 0)
    assert on_cpus.memory_gib >= 2.2 * 2 + on_cpus.shared_gib


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    fake = FakeApi()
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(kuberay_api, "LOOK_EVERY_S", 0.0)
    with serving(fake, tmp_path / "kubeconfig"):
        yield fake


NAME = job_name(RUN_ID)
NAMESPACE = "/apis/ray.io/v1/namespaces/loray/rayjobs"


def create(run: ResolvedRun) -> str:
    """Through the official client."""
    config_map, policy, job = manifests(run, RUN_ID, PODS)
    return kuberay_api.Kubernetes("loray").create(config_map, policy, job)


def test_the_job_owns_what_is_created_with_it(api: FakeApi, tmp_path: Path) -> None:
    assert create(resolved(tmp_path)) == NAME
    job = api.objects[f"{NAMESPACE}/{NAME}"]
    others = [found for path, found in api.objects.items() if not path.startswith(NAMESPACE)]
    assert sorted(found["kind"] for found in others) == ["ConfigMap", "NetworkPolicy"]
    for found in others:
        (owner,) = found["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"]) == ("RayJob", NAME, job["metadata"]["uid"])


def test_a_job_whose_files_cannot_be_created_is_deleted_again(api: FakeApi, tmp_path: Path) -> None:
    api.refuse = "configmaps"
    with pytest.raises(ClusterError, match=r"403 Forbidden: configmaps is forbidden"):
        create(resolved(tmp_path))
    assert not any(path.startswith(NAMESPACE) for path in api.objects)


def test_following_tells_every_state_and_prints_the_log_of_every_attempt(api: FakeApi, tmp_path: Path) -> None:
    name = create(resolved(tmp_path))
    api.log = "step 1/2\nstep 2/2\n"
    running = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
    api.script = [
        {},
        {"jobDeploymentStatus": "Initializing"},
        {**running, "rayClusterName": "a"},
        {**running, "rayClusterName": "a"},
        {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED", "reason": "AppFailed"},
        {**running, "rayClusterName": "b"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "rayClusterName": "b"},
    ]
    printed: list[str] = []
    status = kuberay_api.follow(kuberay_api.Kubernetes("loray"), name, printed.append)
    assert (status.state, status.outcome) == ("Complete", "SUCCEEDED")
    text = "".join(printed)
    assert text.count("step 2/2") == 2, "once for each attempt"
    states = [line.split(": ", 1)[1] for line in text.splitlines() if line.startswith("RayJob")]
    assert states == ["New", "Initializing", "Running", "Retrying (AppFailed)", "Running", "Complete"]


def test_a_log_that_breaks_off_ends_neither_the_run_nor_the_following(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: kuberay_api.Kubernetes, cluster: str) -> Iterator[str]:
        yield "step 1/2\n"
        raise ClusterError("reading the log of pod head: the connection was reset.")

    name = create(resolved(tmp_path))
    monkeypatch.setattr(kuberay_api.Kubernetes, "log", breaks)
    running = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "rayClusterName": "a"}
    api.script = [
        running,
        running,
        {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "rayClusterName": "a"},
    ]
    printed: list[str] = []
    status = kuberay_api.follow(kuberay_api.Kubernetes("loray"), name, printed.append)
    assert status.outcome == "SUCCEEDED"
    assert "".join(printed).count("the connection was reset. The run goes on") == 1


def test_an_api_that_cannot_be_reached_or_does_not_know_the_job_is_told(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = kuberay_api.Kubernetes("loray")
    with pytest.raises(ClusterError, match=r"asking for RayJob r-none: Kubernetes answered 404"):
        cluster.status("r-none")
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ClusterError, match="no Kubernetes cluster is configured"):
        kuberay_api.Kubernetes("loray")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model is made once for it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run_file(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of the bundled model, planned on this machine."""
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAY_CACHE", str(cache))
    return write_run_file(tmp_path / "small", next(iter(BUNDLED)), scale={"workers": 2})


def loray(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The console script's function; its exit code."""
    monkeypatch.setattr(sys, "argv", ["loray", *arguments])
    try:
        main()
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def test_render_prints_a_new_run_with_the_sizes_of_its_plan(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert loray(monkeypatch, "k8s", "render", str(run_file), "--set", "kubernetes.cpus=3") == 0
    config_map, _, job = yaml.safe_load_all(capsys.readouterr().out)
    (group,) = cluster_spec(job)["workerGroupSpecs"]
    assert group["replicas"] == 2
    amounts = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert amounts["cpu"] == "3" and 4 <= int(amounts["memory"].removesuffix("Gi")) <= 16
    Run.create(str(tmp_path / "elsewhere"), "x", "", {}, id=config_map["data"]["run-id"].strip())
    assert operator_rules.problems(job) == []


def test_training_on_kubernetes_creates_follows_and_fails_as_the_job_does(
    run_file: Path, api: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {
        "jobDeploymentStatus": "Failed",
        "jobStatus": "FAILED",
        "reason": "AppFailed",
        "message": "a row is empty",
    }
    api.script = [{**failed, "rayClusterName": "a"}]
    api.log = "DataError: a row is empty\n"
    assert loray(monkeypatch, "train", str(run_file), "--kuberay") == 1
    printed = capsys.readouterr()
    assert "Created RayJob r-" in printed.out
    assert "DataError: a row is empty" in printed.out
    assert "ended Failed (AppFailed: a row is empty)" in printed.err
    api.script = [{"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
    assert loray(monkeypatch, "train", str(run_file), "--kuberay") == 0
    assert loray(monkeypatch, "train", str(run_file), "--kuberay", "-d") == 0
    assert "Follow it: kubectl -n loray get rayjob r-" in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--address", "http://head:8265"), ("--profile",)])
def test_what_does_not_go_with_a_rayjob_is_refused(
    option: tuple[str, ...], run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loray(monkeypatch, "train", str(run_file), "--kuberay", *option) == 2
    assert f"{option[0]} does not go with --kuberay" in capsys.readouterr().err
