"""A run file as Kubernetes objects: the RayJob, its files as a ConfigMap, and the policy that closes its pods to others.

The RayJob is `ray-job.yaml`, which is `k8s/base/train/ray-job.yaml`, filled in: names, sizes, image, queue. What a user wrote
goes into the ConfigMap only; the entrypoint is the template's. Nothing here talks to a cluster: that is `api.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from service import storage
from service.base_models import BUNDLED
from service.config import KubernetesBlock, LoraBlock, ResolvedRun, RunConfig, load_run, report
from service.data import hub
from service.errors import ConfigError
from service.launcher import stage_files
from service.training.memory import MemoryPlan
from service.versions import ANNOTATION

Manifest = dict[str, Any]

RUN_LABEL = "loray.io/run"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
MOUNT = Path("/etc/loray/run")  # of the ConfigMap, in the template
CONFIG_MAP_BYTES = 1_000_000  # the API server takes 1 MiB, with names and all
FINISHED_TTL_S = 60  # of the cluster: the job itself stays
_STARTING_S = 600  # beside scale.wait_s, for the head itself
_LOGS_GIB = 5
_NAME_LENGTH = 47  # of a RayJob: the operator makes longer names of it
_GIB = 2**30
# What a worker takes beside the plan's bytes. On a CPU its freed memory stays with it: seen up to 2.2 times the plan.
_KEPT = {"cpu": 2.2, "cuda": 1.0}
_LIBRARIES = {"cpu": 0.7 * _GIB, "cuda": 3 * _GIB}
_RAY = 1 * _GIB  # raylet and agents of a pod
_SHARED = {"cpu": 2, "cuda": 8}  # GiB of /dev/shm: Ray's objects; on GPUs NCCL's buffers too, for each
_UNSEEN = "is a directory of this machine, which pods do not see. Name"


@dataclass(frozen=True)
class Pods:
    """The worker pods of a run: how many, at least and at most, and what each takes."""

    least: int
    most: int
    workers: int  # in each
    cpus: int
    gpus: int
    memory_gib: int
    shared_gib: int
    cache_gib: int  # of its disk: the base model, what is made from it, and the checkpoint that a run goes on from
    head_cache_gib: int  # of the head's: the base model, whose digest the plan has


def size_pods(resolved: ResolvedRun, memory: MemoryPlan, trainable_bytes: int, base_bytes: int) -> Pods:
    """Pods for a run whose worker takes `memory`. `trainable_bytes` in float32, `base_bytes` of the base model's files."""
    scale, kubernetes = resolved.config.scale, resolved.config.kubernetes
    kind = "cuda" if kubernetes.gpus else "cpu"
    workers = max(1, kubernetes.gpus)
    needed = (memory.host_bytes if kubernetes.gpus else memory.peak) * _KEPT[kind]
    checkpoint_bytes = 3 * trainable_bytes  # weights and both moments
    if kubernetes.gpus and scale.offload != "none":  # the same, each worker its share
        needed += checkpoint_bytes / scale.min_workers
    if kubernetes.gpus and scale.offload == "all":
        needed += base_bytes / scale.min_workers
    shared = _SHARED[kind] * workers
    return Pods(
        least=math.ceil(scale.min_workers / workers),
        most=math.ceil(scale.max_workers / workers),
        workers=workers,
        cpus=kubernetes.cpus * workers,
        gpus=kubernetes.gpus,
        memory_gib=math.ceil((_RAY + workers * (needed + _LIBRARIES[kind])) / _GIB) + shared,
        shared_gib=shared,
        cache_gib=10 + math.ceil((3 * base_bytes + checkpoint_bytes) / _GIB),
        head_cache_gib=10 + math.ceil(3 * base_bytes / _GIB),
    )


def manifests(resolved: ResolvedRun, run_id: str, pods: Pods) -> list[Manifest]:
    """ConfigMap, NetworkPolicy and RayJob, to be created in this order. ConfigError where the run's files are too large."""
    name, kubernetes = job_name(run_id), resolved.config.kubernetes
    return [
        _config_map(name, resolved, run_id, kubernetes.namespace),
        _network_policy(name, kubernetes.namespace),
        _ray_job(name, run_id, resolved.config, pods),
    ]


class _Readable(yaml.SafeDumper):
    """YAML as people write it: files line by line, nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Line by line. Quoted where a reader may find something else: line breaks that only YAML knows, and what YAML 1.1, kubectl
    or our own reader take for a number or a truth."""
    breaks = any(letter in text for letter in "\x85\u2028\u2029")
    if "\n" in text and not breaks:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
    other = breaks or re.match(r"[-+.]?\d|[yYnN]$", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if other else None)


_Readable.add_representer(str, _text)


def as_yaml(documents: list[Manifest]) -> str:
    """For `kubectl create -f -`."""
    return yaml.dump_all(documents, Dumper=_Readable, sort_keys=False, allow_unicode=True, width=math.inf)


def job_name(run_id: str) -> str:
    """The RayJob of a run: its id, where the operator's rules take it; letters first, 47 characters at most.

    >>> job_name("20261127-101500-tickets.v2-0a1b")
    'r-20261127-101500-tickets-v2-0a1b'
    """
    date, time, rest = run_id.split("-", 2)
    name, number = rest.rsplit("-", 1)
    allowed = "".join(letter if letter.isalnum() else "-" for letter in name)
    room = _NAME_LENGTH - len(f"r-{date}-{time}--{number}")
    return f"r-{date}-{time}-{allowed[:room].rstrip('-')}-{number}"


def _config_map(name: str, resolved: ResolvedRun, run_id: str, namespace: str) -> Manifest:
    data = {"run-id": f"{run_id}\n", **dict(_files(resolved))}
    size = sum(len(key) + len(text.encode()) for key, text in data.items())
    if size > CONFIG_MAP_BYTES:
        raise ConfigError(
            f"the run file's local data makes {size / 2**20:.1f} MiB to carry, a ConfigMap holds 1 MiB. "
            "Put the data on shared storage (s3://...) and name it there."
        )
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(name, namespace), "data": data}


def _files(resolved: ResolvedRun) -> Iterator[tuple[str, str]]:
    """The run file and what it names on this machine, as they lie below MOUNT."""
    if problems := list(_left_behind(resolved.config)):
        raise ConfigError(report("the run file", problems))
    with tempfile.TemporaryDirectory(prefix="loray-stage-") as directory:
        stage = Path(directory)
        overrides = [*resolved.overrides, *stage_files(resolved, stage, MOUNT)]
        for file in sorted((stage / "data").iterdir()):
            yield file.name, file.read_bytes().decode()  # read_text would change how lines end
        yield "run.yaml", _complete(stage / "run.yaml", overrides) if overrides else resolved.text


def _left_behind(config: RunConfig) -> Iterator[str]:
    """A line for each thing of this machine that the run file names and a ConfigMap does not take to the pods."""
    model, data, method = config.model, config.data, config.method
    if model.id not in BUNDLED and _is_directory(model.id):
        yield (
            f"model.id: {model.id!r} {_UNSEEN} a hub id (org/name), the bundled {' or '.join(BUNDLED)}, a published model "
            "(name@version) or an s3:// URI."
        )
    if isinstance(method, LoraBlock) and method.init_from and _is_directory(method.init_from):
        yield f"method.init_from: {method.init_from!r} {_UNSEEN} a published adapter (name@version) or an s3:// URI."
    files = {
        **{"data.eval": data.eval, "data.test": data.test},
        **{"data.augment.synonyms": data.augment.synonyms, "model.chat_template": model.chat_template},
    }
    for key, uri in [*(("data.train", source.uri) for source in data.sources), *files.items()]:
        if uri is not None and (why := _not_carried(uri)):
            yield f"{key}: {uri!r} {why}"


def _is_directory(name: str) -> bool:
    """Whether a model or an adapter of this name is looked for on this machine, as `resolve_base_model` does."""
    return name.startswith(("/", "./", "../", "~")) or Path(name).is_dir()


def _not_carried(uri: str) -> str | None:
    """Why the pods would not find what lies there; None where a ConfigMap takes it along, or they fetch it themselves."""
    if hub.is_hub(uri):
        local = Path(uri.removeprefix(hub.SCHEME).partition("?")[0]).is_dir()
        return f"{_UNSEEN} a data set of the hub (hub:owner/name) or an s3:// URI." if local else None
    if not storage.is_local(uri):
        return None
    path = storage.local_path(uri)
    if path.is_dir():
        return f"{_UNSEEN} an s3:// URI."
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return "is no text, and a ConfigMap takes only text to the pods. Name an s3:// URI."
    except OSError as error:
        return f"cannot be read under {Path.cwd()}: {error.strerror}. Check the path."
    return None


def _complete(run_file: Path, overrides: list[str]) -> str:
    """The whole config, where the file alone does not say it any more."""
    config = load_run(str(run_file), overrides).config.model_dump(mode="json", by_alias=True, exclude_none=True)
    return yaml.dump(config, Dumper=_Readable, sort_keys=False, allow_unicode=True)


def _network_policy(name: str, namespace: str) -> Manifest:
    """The pods of a run talk to one another, and to no other run's."""
    mine = {"podSelector": {"matchLabels": {RUN_LABEL: name}}}
    spec = {**mine, "policyTypes": ["Ingress", "Egress"], "ingress": [{"from": [mine]}], "egress": [{"to": [mine]}]}
    metadata = _metadata(name, namespace)
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


def _metadata(name: str, namespace: str) -> dict[str, Any]:
    labels = {"app.kubernetes.io/part-of": "loray", "loray.io/part": "train", RUN_LABEL: name}
    return {"name": name, "namespace": namespace, "labels": labels}


def _ray_job(name: str, run_id: str, config: RunConfig, pods: Pods) -> Manifest:
    kubernetes = config.kubernetes
    version = importlib.metadata.version("loray")
    job = _template()
    job["metadata"] = _metadata(name, kubernetes.namespace)
    job["metadata"]["annotations"] = {ANNOTATION: version, "loray.io/run-id": run_id}
    spec = job["spec"]
    spec |= {"backoffLimit": kubernetes.retries, "activeDeadlineSeconds": kubernetes.deadline_s}
    spec["preRunningDeadlineSeconds"] = math.ceil(config.scale.wait_s) + _STARTING_S
    if kubernetes.queue:
        _queue(job, kubernetes.queue)
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]
    _fill_in(head, name, version, kubernetes, pods)
    _give_cache(head, pods.head_cache_gib)
    _fill_in(group["template"], name, version, kubernetes, pods)
    _size(group, kubernetes, pods)
    for template in (head, group["template"]):
        _named(template["spec"]["containers"][0]["env"], "LORAY_WORKER_PODS")["value"] = str(group["replicas"])
    return job


def _named(items: list[Manifest], name: str) -> Manifest:
    return next(item for item in items if item["name"] == name)


def _template() -> Manifest:
    text = files("service.kuberay").joinpath("ray-job.yaml").read_text(encoding="utf-8")
    document: Manifest = json.loads(json.dumps(yaml.safe_load(text)))  # what YAML's anchors share is copied
    return document


def _queue(job: Manifest, queue: str) -> None:
    """Kueue holds a job by `suspend`, which the operator takes with shutdownAfterJobFinishes, and that not beside rules."""
    job["metadata"]["labels"][QUEUE_LABEL] = queue
    del job["spec"]["deletionStrategy"]
    job["spec"] |= {"suspend": True, "shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": FINISHED_TTL_S}


def _fill_in(template: Manifest, name: str, version: str, kubernetes: KubernetesBlock, pods: Pods) -> None:
    """What head and workers have in common."""
    template["metadata"]["labels"][RUN_LABEL] = name
    template["metadata"]["annotations"][ANNOTATION] = version
    template["spec"]["containers"][0]["image"] = kubernetes.image or f"loray:{version}{'-cuda' if pods.gpus else ''}"
    _named(template["spec"]["volumes"], "run")["configMap"]["name"] = name


def _give_cache(template: Manifest, gib: int) -> None:
    """The limit of its volume, and a node that has the room, with some for logs and packages."""
    _named(template["spec"]["volumes"], "cache")["emptyDir"]["sizeLimit"] = f"{gib}Gi"
    template["spec"]["containers"][0]["resources"]["requests"]["ephemeral-storage"] = f"{gib + _LOGS_GIB}Gi"


def _size(group: Manifest, kubernetes: KubernetesBlock, pods: Pods) -> None:
    """The workers' own: how many, how large, and where.

    The operator takes a job for running once all pods have come that were wanted at first, however long the driver has been at
    work by then. Kueue lets it begin with all; where there is no queue, with as many as the run needs: more are for `kubectl
    patch raycluster`, and the run takes them.
    """
    first = pods.most if kubernetes.queue else pods.least
    group |= {"replicas": first, "minReplicas": pods.least, "maxReplicas": pods.most}
    spec = group["template"]["spec"]
    spec["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"] = dict(group["template"]["metadata"]["labels"])
    amounts = {"cpu": str(pods.cpus), "memory": f"{pods.memory_gib}Gi"}
    if pods.gpus:
        amounts["nvidia.com/gpu"] = str(pods.gpus)
        spec["tolerations"].append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    spec["containers"][0]["resources"] = {"requests": amounts, "limits": dict(amounts)}
    _give_cache(group["template"], pods.cache_gib)
    if kubernetes.nodes:
        spec["nodeSelector"] = dict(kubernetes.nodes)
    _named(spec["volumes"], "shared-memory")["emptyDir"]["sizeLimit"] = f"{pods.shared_gib}Gi"
    group["rayStartParams"]["object-store-memory"] = str(pods.shared_gib * _GIB // 2)  # the other half is NCCL's
