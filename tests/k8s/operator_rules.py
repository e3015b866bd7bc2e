"""What KubeRay 1.7 refuses although its CRDs allow it, told before anything is applied.

The operator's own checks are `ray-operator/controllers/ray/utils/validation.go`; fields behind feature gates that are off by
default count as refused, because nothing happens to them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.k8s.objects import RAY_KINDS, Manifest, cluster_spec, groups

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # a DNS label of RFC 1035
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
TOKEN_SINCE = (2, 52, 0)
START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")  # alpha, off
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
BY_REDIS = ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "REDIS_USERNAME")
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def problems(document: Manifest) -> list[str]:
    """A line for each rule that a RayCluster, RayJob or RayService breaks; nothing for other kinds."""
    kind = document["kind"]
    if kind not in RAY_KINDS:
        return []
    own = {"RayJob": _job, "RayService": _service}.get(kind)
    return [*_name(document), *_cluster(document), *(own(document) if own else ())]


def _name(document: Manifest) -> Iterator[str]:
    name, longest = document["metadata"]["name"], LONGEST_NAME[document["kind"]]
    if len(name) > longest:
        yield f"name {name} has {len(name)} characters, a {document['kind']} at most {longest}"
    if not NAME.fullmatch(name):
        yield f"name {name} is no DNS label that begins with a letter"


def _cluster(document: Manifest) -> Iterator[str]:
    cluster = cluster_spec(document)
    if "headGroupSpec" not in cluster:  # a job on another's cluster
        return
    yield from (f"{field} is behind a feature gate that is off" for field in GATED if field in cluster)
    yield from _groups(document)
    yield from _fault_tolerance(cluster, document["metadata"].get("annotations", {}))
    yield from _autoscaler(document)
    if cluster.get("authOptions", {}).get("mode") == "token":
        version = tuple(int(part) for part in re.findall(r"\d+", cluster.get("rayVersion", "")))
        if version < TOKEN_SINCE:
            yield f"authOptions.mode token needs rayVersion 2.52.0 or newer, here it is {cluster.get('rayVersion')!r}"


def _groups(document: Manifest) -> Iterator[str]:
    names = Counter(name for name, _ in groups(document))
    yield from (f"group {name} stands {count} times" for name, count in names.items() if count > 1)
    for name, group in groups(document):
        params = group.get("rayStartParams", {})
        containers = group["template"]["spec"].get("containers", [])
        if not containers:
            yield f"group {name} has no container"
        elif not containers[0]["name"].startswith("ray-"):
            yield f"group {name}: the first container is the one that Ray is started in, and is called {containers[0]['name']}"
        if group.get("resources") and any(params.get(key) for key in START_RESOURCES):
            yield f"group {name} has resources both in rayStartParams and in resources"
        if "labels" in params:
            yield f"group {name}: rayStartParams.labels is not supported, use labels"
        if name != "headgroup":
            least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31)
            if not least <= group.get("replicas", least) <= most:
                yield f"group {name}: replicas {group['replicas']} are not between {least} and {most}"


def _fault_tolerance(cluster: Manifest, annotations: Manifest) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    names, params = _environment(head), head.get("rayStartParams", {})
    options = cluster.get("gcsFaultToleranceOptions")
    if "redis-username" in params or "REDIS_USERNAME" in names:
        yield "a redis username stands in gcsFaultToleranceOptions only"
    if options is None:
        if "RAY_REDIS_ADDRESS" in names:
            yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        return
    yield from (f"{name} in the head's env, beside gcsFaultToleranceOptions" for name in BY_REDIS[:2] if name in names)
    if "redis-password" in params:
        yield "redis-password in rayStartParams, beside gcsFaultToleranceOptions"
    for annotation in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if annotation in annotations:
            yield f"annotation {annotation}, beside gcsFaultToleranceOptions"
    if options.get("backend") == "rocksdb":
        yield "gcsFaultToleranceOptions.backend rocksdb is behind a feature gate that is off"


def _autoscaler(document: Manifest) -> Iterator[str]:
    cluster = cluster_spec(document)
    options, in_env = cluster.get("autoscalerOptions", {}), _environment(cluster["headGroupSpec"])
    if document["kind"] != "RayCluster" and "upgradeStrategy" in cluster:
        yield f"upgradeStrategy of the cluster in a {document['kind']}"
    if document["kind"] != "RayCluster" and cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield f"enableK8sTokenAuth in a {document['kind']}"
    for name, group in groups(document):
        if "idleTimeoutSeconds" in group and options.get("version") != "v2":
            yield f"group {name} has idleTimeoutSeconds, which wants autoscalerOptions.version v2"
    if not cluster.get("enableInTreeAutoscaling"):
        if in_env.get("RAY_enable_autoscaler_v2") in ("1", "true"):
            yield "RAY_enable_autoscaler_v2 without enableInTreeAutoscaling"
        return
    if "version" in options and "RAY_enable_autoscaler_v2" in in_env:
        yield "RAY_enable_autoscaler_v2 beside autoscalerOptions.version"
    for name, group in groups(document):
        if group.get("suspend"):
            yield f"group {name} is suspended, and the autoscaler is on"
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if options.get("version", "v2") == "v2" and policy != "Never":
            yield f"group {name} has restartPolicy {policy}, and autoscaler v2 wants Never or none"


def _job(document: Manifest) -> Iterator[str]:
    spec = document["spec"]
    mode, selected = spec.get("submissionMode", "K8sJobMode"), spec.get("clusterSelector")
    retries = spec.get("backoffLimit", 0)
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend without shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    if retries < 0:
        yield f"backoffLimit {retries} is negative"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field, 1) <= 0:
            yield f"{field} {spec[field]} is not positive"
    if mode == "InteractiveMode" and retries > 0:
        yield "backoffLimit in InteractiveMode"
    if selected:
        excluded = {"suspend": spec.get("suspend"), "backoffLimit": retries, "SidecarMode": mode == "SidecarMode"}
        yield from (f"clusterSelector together with {what}" for what, is_there in excluded.items() if is_there)
    elif "rayClusterSpec" not in spec:
        yield "neither rayClusterSpec nor clusterSelector"
    if mode == "SidecarMode":
        for field in ("submitterPodTemplate", "submitterConfig"):
            if field in spec:
                yield f"{field} in SidecarMode"
        policy = spec.get("rayClusterSpec", {}).get("headGroupSpec", {}).get("template", {}).get("spec", {})
        if policy.get("restartPolicy", "Never") != "Never":
            yield f"the head has restartPolicy {policy['restartPolicy']}, and SidecarMode wants Never or none"
    yield from _deletion(spec, autoscaled=bool(spec.get("rayClusterSpec", {}).get("enableInTreeAutoscaling")))
    yield from _shell(spec)


def _deletion(spec: Manifest, *, autoscaled: bool) -> Iterator[str]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    rules = strategy.get("deletionRules", [])
    legacy = [field for field in ("onSuccess", "onFailure") if field in strategy]
    if not rules and len(legacy) != 2:
        yield "deletionStrategy has neither deletionRules nor both of onSuccess and onFailure"
    if rules and legacy:
        yield "deletionRules beside onSuccess or onFailure"
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield "deletionRules beside shutdownAfterJobFinishes"
    after: dict[str, dict[str, int]] = {}
    for rule in rules:
        policy, condition = rule["policy"], rule["condition"]
        if ("jobStatus" in condition) == ("jobDeploymentStatus" in condition):
            yield f"a rule to {policy} has not one of jobStatus and jobDeploymentStatus"
            continue
        if spec.get("clusterSelector") and policy in DELETION_ORDER[:2]:
            yield f"{policy} with clusterSelector"
        if autoscaled and policy == "DeleteWorkers":
            yield "DeleteWorkers with autoscaling"
        when = condition.get("jobStatus") or condition["jobDeploymentStatus"]
        if policy in after.setdefault(when, {}):
            yield f"two rules to {policy} when {when}"
        after[when][policy] = condition.get("ttlSeconds", 0)
    ended, settled = after.get("FAILED", {}), after.get("Failed", {})  # a job that is the one is the other too
    for policy in sorted(policy for policy in ended.keys() & settled.keys() if ended[policy] != settled[policy]):
        yield f"{policy} {ended[policy]} s after FAILED and {settled[policy]} s after Failed: the sooner rule always wins"
    for when, seconds in after.items():
        ordered = [seconds[policy] for policy in DELETION_ORDER if policy in seconds]
        if ordered != sorted(ordered):
            yield f"when {when}, workers, cluster and job are not deleted in this order: {ordered}"


def _shell(spec: Manifest) -> Iterator[str]:
    """The operator pastes these into a line for bash: what a shell would read something into must not be in them."""
    for field in ("entrypoint", "runtimeEnvYAML"):
        found = set(re.findall(r"[$`;&|<>()\\!*?~#']", spec.get(field, "")))
        if found:
            yield f"{field} has {' '.join(sorted(found))}, and goes into a shell line"


def _service(document: Manifest) -> Iterator[str]:
    spec = document["spec"]
    cluster = cluster_spec(document)
    if cluster["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headGroupSpec.headService has a name"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"
    timeout = document["metadata"].get("annotations", {}).get("ray.io/initializing-timeout", "1s")
    if not re.fullmatch(r"(\d+(\.\d+)?(ms|s|m|h))+|[1-9]\d*", timeout) or not re.search(r"[1-9]", timeout):
        yield f"annotation ray.io/initializing-timeout {timeout!r} is no positive duration such as 30m"
    strategy = spec.get("upgradeStrategy", {})
    kind = strategy.get("type", "NewCluster")
    if kind not in UPGRADES:
        yield f"upgradeStrategy.type {kind} is none of {', '.join(UPGRADES)}"
    if kind == "NewClusterWithIncrementalUpgrade":
        yield from _incremental(strategy.get("clusterUpgradeOptions"), cluster)


def _incremental(options: Any, cluster: Manifest) -> Iterator[str]:
    if not cluster.get("enableInTreeAutoscaling"):
        yield "an incremental upgrade needs enableInTreeAutoscaling"
    if not options:
        yield "an incremental upgrade needs clusterUpgradeOptions"
        return
    step, surge = options.get("stepSizePercent", -1), options.get("maxSurgePercent", 100)
    if not 0 <= surge <= 100:
        yield f"maxSurgePercent {surge} is not between 0 and 100"
    if not 0 <= step <= surge:
        yield f"stepSizePercent {step} is not between 0 and maxSurgePercent {surge}"
    if options.get("intervalSeconds", 0) <= 0:
        yield "intervalSeconds is not positive"
    if not options.get("gatewayClassName"):
        yield "an incremental upgrade needs gatewayClassName"


def _environment(group: Manifest) -> dict[str, str]:
    """Name and value of what the Ray container's env holds; "" for a value that comes from elsewhere."""
    containers = group["template"]["spec"].get("containers", [])
    return {entry["name"]: entry.get("value", "") for entry in (containers[0].get("env", []) if containers else [])}
