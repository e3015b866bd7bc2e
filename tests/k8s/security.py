"""What holds for every pod: no privilege, limits, probes, nothing reachable that should not be, images that stay the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from tests.k8s.objects import RAY_KINDS, Manifest, Pod, called, cluster_spec, groups, of_kind, pods
from tests.k8s.references import matches

IMAGE = re.compile(r"[\w./-]+:(?P<tag>[\w.-]+)(@sha256:[0-9a-f]{64})?|[\w./-]+@sha256:[0-9a-f]{64}")
HOST = ("hostNetwork", "hostPID", "hostIPC")
ACCOUNT_AT = "/var/run/secrets/kubernetes.io/serviceaccount"
SAFE_TO_EVICT = "cluster-autoscaler.kubernetes.io/safe-to-evict"
UNITS = {"Gi": 2**30, "Mi": 2**20}


def problems(documents: Sequence[Manifest]) -> list[str]:
    """A line for each thing that is not as it should be."""
    found = [f"{pod.where}: {line}" for pod in pods(documents) for line in (*_pod(pod), *_closed(pod, documents))]
    for document in of_kind(documents, *RAY_KINDS):
        cluster = cluster_spec(document)
        if cluster.get("authOptions", {}).get("mode") != "token":
            found.append(f"{called(document)}: token authentication is not on")
        if cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
            found.append(f"{called(document)}: the head takes work: set num-cpus to 0")
        if cluster.get("enableInTreeAutoscaling"):
            found += [f"{called(document)}, autoscaler: {line}" for line in _autoscaler(cluster)]
        head = cluster["headGroupSpec"]["template"]["metadata"].get("annotations", {})
        if document["kind"] == "RayJob" and head.get(SAFE_TO_EVICT) != "false":
            found.append(f"{called(document)}: the head may be evicted, which costs an attempt")
        if document["kind"] == "RayJob":
            found += [f"{called(document)}: {line}" for line in _waits_for(cluster)]
        for name, group in groups(document):
            found += [f"{called(document)}, {name}: {line}" for line in _object_store(group)]
    return found


def _waits_for(cluster: Manifest) -> Iterator[str]:
    """A driver that is over sooner than its pods are there waits for as many as the operator."""
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    told = [variable["value"] for variable in head["env"] if variable["name"] == "LORAY_WORKER_PODS"]
    replicas = sum(group["replicas"] for group in cluster["workerGroupSpecs"])
    if told != [str(replicas)]:
        yield f"LORAY_WORKER_PODS is {told}, and there are {replicas} replicas"


def _autoscaler(cluster: Manifest) -> Iterator[str]:
    """The operator adds its container to the head."""
    options = cluster.get("autoscalerOptions", {})
    yield from _context(options.get("securityContext", {}))
    mounts = {mount["mountPath"]: mount["name"] for mount in options.get("volumeMounts", ())}
    if mounts.get(ACCOUNT_AT) not in _tokens(cluster["headGroupSpec"]["template"]["spec"]):
        yield "has no token to ask the Kubernetes API for pods with"


def _tokens(spec: Manifest) -> set[str]:
    """The volumes with a token of the Kubernetes API."""
    return {
        volume["name"]
        for volume in spec.get("volumes", ())
        for source in volume.get("projected", {}).get("sources", ())
        if "serviceAccountToken" in source
    }


def _object_store(group: Manifest) -> Iterator[str]:
    """Ray takes 30 % of the memory, and a disk where /dev/shm is smaller than that."""
    given = int(group.get("rayStartParams", {}).get("object-store-memory", 0))
    volumes = {volume["name"]: volume for volume in group["template"]["spec"].get("volumes", ())}
    limit = volumes.get("shared-memory", {}).get("emptyDir", {}).get("sizeLimit", "0Gi")
    if not 0 < given <= int(limit[:-2]) * UNITS[limit[-2:]]:
        yield f"object-store-memory is {given}, and /dev/shm has {limit}"


def _pod(pod: Pod) -> Iterator[str]:
    spec = pod.spec
    context = spec.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "runs as root, or may"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile"
    yield from (f"shares the node's {field}" for field in HOST if spec.get(field))
    yield from (f"volume {v['name']} is the node's" for v in spec.get("volumes", ()) if "hostPath" in v)
    if spec.get("automountServiceAccountToken") is not False:
        yield "has a token of the Kubernetes API that it does not need"
    for container in pod.containers:
        yield from (f"{container['name']}: {line}" for line in _container(container, pod))
        if _tokens(spec) & {mount["name"] for mount in container.get("volumeMounts", ())}:
            yield f"{container['name']}: has a token of the Kubernetes API that it does not need"


def _container(container: Manifest, pod: Pod) -> Iterator[str]:
    yield from _context(container.get("securityContext", {}))
    yield from _image(container["image"])
    resources = container.get("resources", {})
    for kind in ("requests", "limits"):
        for amount in ("cpu", "memory"):
            if amount not in resources.get(kind, {}):
                yield f"resources.{kind} has no {amount}"
    if pod.ray and "ephemeral-storage" not in resources.get("requests", {}):
        yield "asks for no disk, and is the first to go where that is full"
    if resources.get("requests", {}).get("memory") != resources.get("limits", {}).get("memory"):
        yield "asks for less memory than it may take: the node may kill it"
    goes_on = pod.spec.get("restartPolicy") != "OnFailure"
    for probe in ("readinessProbe", "livenessProbe"):
        if goes_on and probe not in container:
            yield f"has no {probe}"
    if pod.ray:
        yield from _ray(container, pod)


def _context(context: Manifest) -> Iterator[str]:
    if context.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges"
    if context.get("privileged"):
        yield "is privileged"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "can write its root file system"
    capabilities = context.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield "keeps capabilities"


def _image(image: str) -> Iterator[str]:
    match = IMAGE.fullmatch(image)
    if not match:
        yield f"image {image} has neither tag nor digest"
    elif match["tag"] == "latest":
        yield f"image {image} is another one tomorrow"


def _ray(container: Manifest, pod: Pod) -> Iterator[str]:
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes: dict[str, Any] = {volume["name"]: volume for volume in pod.spec["volumes"]}
    shared = volumes.get(mounts.get("/dev/shm", ""), {})  # noqa: S108 - a path in a container
    if shared.get("emptyDir", {}).get("medium") != "Memory":
        yield "has no shared memory at /dev/shm"
    if not {"/tmp", "/home/loray", "/cache"} <= set(mounts):  # noqa: S108
        yield "cannot write where Ray and loray write"
    if pod.ray == "worker":
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if hook[:3] != ["python", "-m", "jobs.leave"]:
            yield "does not leave the cluster in order"
        elif not float(hook[-1]) < pod.spec.get("terminationGracePeriodSeconds", 30):
            yield "is killed while it is still leaving: terminationGracePeriodSeconds is too short"


def _closed(pod: Pod, documents: Sequence[Manifest]) -> Iterator[str]:
    """Some policy that allows nothing selects the pod, in both directions."""
    for direction in ("Ingress", "Egress"):
        if not any(
            direction in policy["spec"]["policyTypes"]
            and direction.lower() not in policy["spec"]
            and matches(policy["spec"]["podSelector"], pod.labels)
            for policy in of_kind(documents, "NetworkPolicy")
        ):
            yield f"is open by default to {direction}"
