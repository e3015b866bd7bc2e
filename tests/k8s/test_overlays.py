"""Every directory of `k8s/`, as kustomize builds it: valid, complete, safe, and of one piece with the code that it runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Qwen2Config

from serve.api_keys import key_for, load_keys
from service import launcher
from service.config import load_run
from service.kuberay.manifests import QUEUE_LABEL, size_pods
from service.runs import Run
from service.training import methods
from service.training.memory import MemoryPlan
from service.versions import ANNOTATION
from tests.k8s import operator_rules, references, schemas, security
from tests.k8s.conftest import K8S, ROOT, Build
from tests.k8s.network import End, allowed
from tests.k8s.objects import RAY_KINDS, Manifest, Pod, cluster_spec, gateway_pods, groups, of_kind, pods

README = K8S / "README.md"
# What lies in one cluster together: an overlay, and the runs and clusters that are applied beside it.
# A namespace of its own, for runs, beside one of these sets.
TEAM = K8S / "overlays" / "team"
SETS = {"base": K8S / "base", **{name: K8S / "overlays" / name for name in ("local-cpu", "gpu", "kueue")}}
DIRECTORIES = sorted(
    file.parent
    for file in K8S.rglob("kustomization.yaml")
    if yaml.safe_load(file.read_text())["kind"] == "Kustomization"
)
Whole = Callable[[str], list[Manifest]]


@pytest.fixture(scope="session")
def whole(build: Build) -> Whole:
    """All documents of a set."""

    def documents(name: str) -> list[Manifest]:
        inside = [d for d in DIRECTORIES if d == SETS[name] or SETS[name] in d.parents]
        if name == "base":
            inside = [
                d for d in inside if d not in (K8S / "base" / "serve", K8S / "base" / "project")
            ]  # the base has them
        return [document for directory in inside for document in build(directory)]

    return documents


@pytest.fixture(scope="session")
def secrets() -> dict[str, set[str]]:
    """The Secrets that the README's commands make, with their keys."""
    made: dict[str, set[str]] = {}
    for command in re.findall(r"create secret generic (.*?)(?:\n\n|\n[a-z]|```)", README.read_text(), flags=re.DOTALL):
        made[command.split()[0]] = set(re.findall(r"--from-(?:literal|file)=([\w.]+)=", command))
    return made


KUBECTL_THAT_KEEPS_FILES = """#!/bin/bash
for argument in "$@"; do [[ $argument == --from-file=keys.yaml=* ]] && cat "${argument#*yaml=}" >keys.yaml; done
echo "$@" >>commands
"""


def test_the_keys_of_the_readmes_commands_are_keys_that_the_endpoint_takes(tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), flags=re.DOTALL)
    lines = "\n".join(block[block.index("loray keys new") :] for block in blocks if "loray keys new" in block)
    (tmp_path / "kubectl").write_text(KUBECTL_THAT_KEEPS_FILES)
    (tmp_path / "kubectl").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = f"set -euo pipefail\n{lines}\necho $KEY $METRICS_KEY >secrets"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    keys = load_keys({}, str(tmp_path / "keys.yaml"))
    admin, metrics = (key_for(f"Bearer {secret}", keys) for secret in (tmp_path / "secrets").read_text().split())
    assert admin and metrics and admin.may("admin")
    assert metrics.may("infer") and not metrics.may("admin")
    assert "loray-metrics-key --from-literal=secret=" in (tmp_path / "commands").read_text()


def test_every_directory_is_looked_at() -> None:
    assert len(DIRECTORIES) >= 11
    assert all(d == TEAM or any(d == s or s in d.parents for s in SETS.values()) for d in DIRECTORIES)


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda d: str(d.relative_to(K8S)))
def test_what_kustomize_builds_is_valid_for_kubernetes_and_for_the_operator(
    directory: Path, build: Build, crds: dict[str, Any]
) -> None:
    documents = build(directory)
    found = [line for document in documents for line in schemas.problems(document, crds)]
    found += [f"{d['metadata']['name']}: {line}" for d in documents for line in operator_rules.problems(d)]
    assert found == []
    namespace = "team" if directory == TEAM else "loray"
    assert all(d["metadata"].get("namespace") == namespace for d in documents if d["kind"] not in CLUSTER_WIDE)
    assert all(d["metadata"]["name"] == namespace for d in of_kind(documents, "Namespace"))


CLUSTER_WIDE = ("Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue")


@pytest.mark.parametrize("name", SETS)
def test_everything_that_is_named_exists(name: str, whole: Whole, secrets: dict[str, set[str]]) -> None:
    assert references.problems(whole(name), secrets) == []


@pytest.mark.parametrize("name", SETS)
def test_every_pod_is_without_privilege_and_within_limits(name: str, whole: Whole) -> None:
    documents = whole(name)
    assert len(list(pods(documents))) >= 5
    assert security.problems(documents) == []


@pytest.mark.parametrize("name", SETS)
def test_only_the_gateway_is_reachable_from_elsewhere(name: str, whole: Whole) -> None:
    documents = whole(name)
    stranger, internet = End({"app": "shop"}, namespace="shop"), End({}, address="203.0.113.9")
    operator, prometheus = End({}, namespace="kuberay-system"), End({}, namespace="monitoring")
    for pod in pods(documents):
        here = End(pod.labels)
        gateway = pod.labels["loray.io/part"] == "serve"
        assert allowed(documents, stranger, here, 8000) == gateway, pod.where
        for port in (6379, 8265, 10001, 52365, 9000):  # GCS and Redis, dashboard, Ray client, agent, object store
            assert not allowed(documents, stranger, here, port), (pod.where, port)
            assert not allowed(documents, internet, here, port), (pod.where, port)
        assert allowed(documents, operator, here, 8265) == bool(pod.ray), pod.where
        assert allowed(documents, prometheus, here, 8080) == bool(pod.ray), pod.where


def test_the_proxies_of_a_gateway_take_requests_and_reach_the_endpoint(whole: Whole) -> None:
    documents = whole("gpu")
    (labels,) = gateway_pods(documents)
    assert not list(gateway_pods(whole("local-cpu")))
    assert all(f"get gateway {name} " in README.read_text() for name in labels.values())
    proxy, stranger, internet = End(labels), End({"app": "shop"}, namespace="shop"), End({}, address="203.0.113.9")
    istiod, envoy_gateway = End({"app": "istiod"}, "istio-system"), End({}, "envoy-gateway-system")
    for source in (stranger, internet):
        assert all(allowed(documents, source, proxy, port) for port in (80, 10080))
        assert not allowed(documents, source, proxy, 15000), "Envoy's own administration"
    assert allowed(documents, proxy, istiod, 15012) and allowed(documents, proxy, envoy_gateway, 18000)
    assert not allowed(documents, proxy, internet, 443)
    for pod in pods(documents):
        assert allowed(documents, proxy, End(pod.labels), 8000) == (pod.labels["loray.io/part"] == "serve"), pod.where
        assert not allowed(documents, proxy, End(pod.labels), 8265), pod.where
        assert allowed(documents, envoy_gateway, End(pod.labels), 8000) == allowed(
            documents, proxy, End(pod.labels), 8000
        )


def _whose(pod: Pod) -> str:
    """The run that a pod belongs to, or else the part."""
    return pod.labels.get("loray.io/run") or pod.labels["loray.io/part"]


@pytest.mark.parametrize("name", SETS)
def test_the_pods_of_a_cluster_reach_one_another_and_no_other_cluster(name: str, whole: Whole) -> None:
    documents = whole(name)
    here = {_whose(pod): End(pod.labels) for pod in pods(documents) if pod.ray == "head"}
    there = {_whose(pod): End(pod.labels) for pod in pods(documents) if pod.ray == "worker"}
    assert set(here) == set(there) >= {"serve", "tickets"}
    for one, source in here.items():
        for other, target in there.items():
            assert allowed(documents, source, target, 43210) == (one == other), (one, other)
    another_run = End({**here["tickets"].labels, "loray.io/run": "another"})
    assert not allowed(documents, another_run, there["tickets"], 6379)
    redis = End({"app.kubernetes.io/part-of": "loray", "loray.io/part": "redis"})
    assert allowed(documents, here["serve"], redis, 6379)
    assert not allowed(documents, here["tickets"], redis, 6379)
    storage, node = End({}, address="52.216.0.1"), End({}, address="169.254.169.254")
    for source in here.values():
        assert allowed(documents, source, storage, 443)
        assert not allowed(documents, source, node, 443), "the node's identity"
        assert not allowed(documents, source, storage, 22)


@pytest.mark.parametrize("name", SETS)
def test_the_embedded_run_files_load_and_fit_their_pods(name: str, whole: Whole, tmp_path: Path) -> None:
    documents = whole(name)
    maps = {d["metadata"]["name"]: d["data"] for d in of_kind(documents, "ConfigMap")}
    for job in of_kind(documents, "RayJob"):
        (group,) = cluster_spec(job)["workerGroupSpecs"]
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        files = maps[volumes["run"]["configMap"]["name"]]
        assert {word.removeprefix("/etc/loray/run/") for word in _paths(job)} <= set(files)
        (tmp_path / "run.yaml").write_text(files["run.yaml"])
        config = load_run(str(tmp_path / "run.yaml")).config
        in_pod = int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 1))
        workers = group["replicas"] * in_pod
        if "run-id" in files:
            Run.create(str(tmp_path / "home"), "any", "", {}, id=files["run-id"].strip())
            assert workers <= config.scale.max_workers, job["metadata"]["name"]
        assert config.scale.min_workers <= workers, job["metadata"]["name"]
        for uri in (config.data.train, config.data.eval or config.data.train):
            assert isinstance(uri, str)
            recipe = Path(uri.replace("/opt/loray/recipes", str(ROOT / "jobs" / "recipes")))
            assert uri.startswith("s3://") or recipe.is_file(), uri


def _paths(job: Manifest) -> list[str]:
    """The files that an entrypoint names."""
    return [word for word in job["spec"]["entrypoint"].split() if word.startswith("/")]


# The only lines that the operator ever pastes into a shell.
ENTRYPOINTS = {
    "tickets": "python -m jobs.train /etc/loray/run/run.yaml --run-id-file /etc/loray/run/run-id",
    "tickets-sweep": "python -m jobs.sweep /etc/loray/run/sweep.yaml --sweep-id-file /etc/loray/run/sweep-id",
}


@pytest.mark.parametrize("name", SETS)
def test_entrypoints_are_fixed_and_hooks_are_modules_of_ours(name: str, whole: Whole) -> None:
    documents = whole(name)
    for job in of_kind(documents, "RayJob"):
        assert job["spec"]["entrypoint"] == ENTRYPOINTS[job["metadata"]["name"]]
    containers = [container for pod in pods(documents) for container in pod.containers if "lifecycle" in container]
    hooks = {tuple(container["lifecycle"]["preStop"]["exec"]["command"][:3]) for container in containers}
    assert hooks == {("python", "-m", "jobs.leave")}
    assert importlib.util.find_spec("jobs.leave") and importlib.util.find_spec("jobs.train")


@pytest.mark.parametrize("name", SETS)
def test_versions_and_environment_are_those_of_the_code(name: str, whole: Whole) -> None:
    documents = whole(name)
    for document in of_kind(documents, *RAY_KINDS):
        assert cluster_spec(document)["rayVersion"] == importlib.metadata.version("ray")
        for _, group in groups(document):
            template = group["template"]
            version = importlib.metadata.version("loray")
            assert template["metadata"]["annotations"][ANNOTATION] == version
            image = template["spec"]["containers"][0]["image"]
            assert re.fullmatch(rf"loray:{re.escape(version)}(-cuda)?", image)
    (environment,) = [
        d["data"] for d in of_kind(documents, "ConfigMap") if d["metadata"]["name"] == "loray-environment"
    ]
    assert launcher.RAY_ENVIRONMENT.items() <= environment.items()
    assert environment["LORAY_HOME"].startswith("s3://")
    assert not any(re.search("SECRET|TOKEN|PASSWORD|KEY", key) for key in environment)


def test_redis_takes_the_shells_place_and_its_password_is_in_no_argument(build: Build, tmp_path: Path) -> None:
    """With a server that tells its process, its arguments and what it reads."""
    (redis,) = (d for d in of_kind(build(K8S / "base"), "StatefulSet") if d["metadata"]["name"] == "redis")
    server = tmp_path / "valkey-server"
    server.write_text('#!/bin/sh\necho "$$ $*"\ncat\n')
    server.chmod(0o755)
    command = redis["spec"]["template"]["spec"]["containers"][0]["command"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REDIS_PASSWORD": "secret"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        told, _ = process.communicate(timeout=30)
    assert told.splitlines() == [f"{process.pid} -", "requirepass secret", "appendonly yes", "dir /data"]


def test_the_cache_of_the_full_fine_tuning_holds_base_and_checkpoint(build: Build, tmp_path: Path) -> None:
    """A worker that comes later fetches the whole checkpoint, float32 weights with both moments."""
    directory = K8S / "overlays" / "gpu" / "train"
    resolved = load_run(str(directory / "run.yaml"))
    model = tmp_path / "Qwen2.5-7B-Instruct"  # by its published config, without weights
    Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(model)  # fmt: skip
    trainable, _ = methods.weight_bytes(methods.skeleton(model, resolved.config), resolved.config)
    memory = MemoryPlan("cuda", {}, {"train": 0}, 0, 1, 4096, 4096)
    pods_of_plan = size_pods(resolved, memory, trainable, trainable // 2)  # its files are bfloat16
    (job,) = of_kind(build(directory), "RayJob")
    (group,) = cluster_spec(job)["workerGroupSpecs"]
    (cache,) = (v["emptyDir"] for v in group["template"]["spec"]["volumes"] if v["name"] == "cache")
    assert 3 * trainable / 2**30 > 80, "the checkpoint alone"
    assert int(cache["sizeLimit"].removesuffix("Gi")) >= pods_of_plan.cache_gib


def test_a_queue_holds_jobs_by_suspend_and_deletes_them_as_the_operator_allows(build: Build) -> None:
    (job,) = of_kind(build(K8S / "overlays" / "kueue" / "train"), "RayJob")
    assert job["metadata"]["labels"][QUEUE_LABEL] == "training"
    assert job["spec"]["suspend"] and job["spec"]["shutdownAfterJobFinishes"]
    assert "deletionStrategy" not in job["spec"]


def _changed(directory: Path, target: Path, file: str, before: str, after: str, count: int = 1) -> Path:
    """A copy of `k8s/` with one line changed, as the README says; the directory's copy."""
    copy = target / "k8s"
    shutil.copytree(K8S, copy)
    edited = copy / directory.relative_to(K8S) / file
    text = edited.read_text()
    assert text.count(before) == count, (file, before)
    edited.write_text(text.replace(before, after))
    return copy / directory.relative_to(K8S)


def test_the_model_the_adapters_and_the_replicas_are_a_line_each(build: Build, tmp_path: Path) -> None:
    lines = {
        "model: Qwen/Qwen2.5-7B-Instruct": "model: Qwen/Qwen2.5-32B-Instruct",
        "adapters: []": "adapters: [tickets@production]",
        "replicas: {min: 1, max: 4}": "replicas: {min: 2, max: 4}",
    }
    for number, (before, after) in enumerate(lines.items()):
        assert f"`{after}`" in README.read_text(), "the README shows this very line"
        directory = _changed(K8S / "overlays" / "gpu", tmp_path / str(number), "endpoint.yaml", before, after)
        (service,) = of_kind(build(directory), "RayService")
        (was,) = of_kind(build(K8S / "overlays" / "gpu"), "RayService")
        key = after.split(":")[0]
        now, then = (yaml.safe_load(s["spec"]["serveConfigV2"])["applications"][0]["args"] for s in (service, was))
        assert now[key] == yaml.safe_load(after)[key] != then[key]
        assert service["spec"]["rayClusterConfig"] == was["spec"]["rayClusterConfig"], "the cluster stays"


def test_the_workers_of_a_run_are_a_line(build: Build, tmp_path: Path) -> None:
    after = "value: 4 # workers"
    assert f"`{after}`" in README.read_text()
    directory = _changed(
        K8S / "overlays" / "local-cpu" / "train", tmp_path, "kustomization.yaml", "value: 2 # workers", after, 1
    )
    (job,) = of_kind(build(directory), "RayJob")
    (group,) = cluster_spec(job)["workerGroupSpecs"]
    assert group["replicas"] == 4
    (head,) = cluster_spec(job)["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "LORAY_WORKER_PODS", "value": "4"} in head["env"], "it follows"
    assert operator_rules.problems(job) == []
