"""Each rule of the validator, broken once: what is applied today would otherwise prove only that nobody has erred yet."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.k8s import operator_rules, references, schemas, security
from tests.k8s.conftest import K8S, Build
from tests.k8s.network import End, allowed
from tests.k8s.objects import Manifest, cluster_spec, of_kind

Break = Callable[[Manifest], object]


def set_at(path: str, value: Any) -> Break:
    """Sets a field: `spec.rayClusterSpec.workerGroupSpecs.0.replicas`; lists are indexed by number."""

    def change(document: Manifest) -> None:
        target: Any = document
        *inner, last = path.split(".")
        for part in inner:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        target[int(last) if isinstance(target, list) else last] = value

    return change


def without(path: str) -> Break:
    """Takes a field away."""

    def change(document: Manifest) -> None:
        target: Any = document
        *inner, last = path.split(".")
        for part in inner:
            target = target[int(part)] if isinstance(target, list) else target[part]
        del target[last]

    return change


def both(*changes: Break) -> Break:
    """One after the other."""
    return lambda document: [change(document) for change in changes]


def add_env(name: str, value: str) -> Break:
    """A variable more in the head's Ray container."""
    entry = {"name": name, "value": value}
    return lambda d: cluster_spec(d)["headGroupSpec"]["template"]["spec"]["containers"][0]["env"].append(entry)


HEAD, GROUP = "spec.rayClusterSpec.headGroupSpec", "spec.rayClusterSpec.workerGroupSpecs.0"
RULES = "spec.deletionStrategy.deletionRules"
DELETE_WORKERS_LATE = {"policy": "DeleteWorkers", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 61}}
AUTOSCALED = set_at("spec.rayClusterSpec.enableInTreeAutoscaling", True)

JOB: Mapping[str, tuple[Break, str]] = {
    "a name that is too long": (set_at("metadata.name", "t" * 48), "48 characters, a RayJob at most 47"),
    "a name that begins with a digit": (set_at("metadata.name", "7b"), "no DNS label that begins with a letter"),
    "no container in the head": (set_at(f"{HEAD}.template.spec.containers", []), "headgroup has no container"),
    "Ray not in the first container": (set_at(f"{GROUP}.template.spec.containers.0.name", "proxy"), "is called proxy"),
    "two groups of one name": (lambda d: cluster_spec(d)["workerGroupSpecs"].append(copy.deepcopy(cluster_spec(d)["workerGroupSpecs"][0])), "worker stands 2 times"),
    "resources in two places": (set_at(f"{HEAD}.resources", {"CPU": "1"}), "both in rayStartParams and in resources"),
    "labels as a start parameter": (set_at(f"{GROUP}.rayStartParams", {"labels": "a=b"}), "rayStartParams.labels"),
    "more replicas than the most": (set_at(f"{GROUP}.replicas", 65), "replicas 65 are not between 1 and 64"),
    "a gated field": (set_at("spec.rayClusterSpec.networkPolicy", {"mode": "DenyAll"}), "networkPolicy is behind a feature gate"),
    "a token without a version of Ray": (without("spec.rayClusterSpec.rayVersion"), "needs rayVersion 2.52.0"),
    "a token and too old a Ray": (set_at("spec.rayClusterSpec.rayVersion", "2.51.1"), "here it is '2.51.1'"),
    "Redis without its options": (add_env("RAY_REDIS_ADDRESS", "redis:6379"), "RAY_REDIS_ADDRESS without"),
    "autoscaler v2 by environment only": (add_env("RAY_enable_autoscaler_v2", "true"), "without enableInTreeAutoscaling"),
    "autoscaler v2 said twice": (both(AUTOSCALED, set_at("spec.rayClusterSpec.autoscalerOptions", {"version": "v2"}), add_env("RAY_enable_autoscaler_v2", "true")), "beside autoscalerOptions.version"),
    "a pod that restarts under autoscaler v2": (both(AUTOSCALED, set_at(f"{GROUP}.template.spec.restartPolicy", "Always")), "autoscaler v2 wants Never"),
    "a suspended group under the autoscaler": (both(AUTOSCALED, set_at(f"{GROUP}.suspend", True)), "is suspended"),
    "workers deleted under the autoscaler": (AUTOSCALED, "DeleteWorkers with autoscaling"),
    "suspend without shutdown": (set_at("spec.suspend", True), "suspend without shutdownAfterJobFinishes"),
    "a time to live without shutdown": (set_at("spec.ttlSecondsAfterFinished", 60), "without shutdownAfterJobFinishes"),
    "negative retries": (set_at("spec.backoffLimit", -1), "backoffLimit -1 is negative"),
    "no time at all": (set_at("spec.activeDeadlineSeconds", 0), "activeDeadlineSeconds 0 is not positive"),
    "retries in InteractiveMode": (set_at("spec.submissionMode", "InteractiveMode"), "backoffLimit in InteractiveMode"),
    "a cluster chosen and a sidecar": (set_at("spec.clusterSelector", {"ray.io/cluster": "x"}), "clusterSelector together with SidecarMode"),
    "no cluster at all": (without("spec.rayClusterSpec"), "neither rayClusterSpec nor clusterSelector"),
    "a submitter's template beside a sidecar": (set_at("spec.submitterPodTemplate", {}), "submitterPodTemplate in SidecarMode"),
    "a submitter's retries beside a sidecar": (set_at("spec.submitterConfig", {"backoffLimit": 1}), "submitterConfig in SidecarMode"),
    "a head that restarts beside a sidecar": (set_at(f"{HEAD}.template.spec.restartPolicy", "Always"), "SidecarMode wants Never"),
    "deletion rules and shutdown": (set_at("spec.shutdownAfterJobFinishes", True), "deletionRules beside shutdownAfterJobFinishes"),
    "deletion rules and the older fields": (set_at("spec.deletionStrategy.onSuccess", {"policy": "DeleteSelf"}), "deletionRules beside onSuccess"),
    "a strategy without rules": (set_at("spec.deletionStrategy", {}), "neither deletionRules nor"),
    "a rule with two conditions": (set_at(f"{RULES}.0.condition.jobDeploymentStatus", "Failed"), "not one of jobStatus"),
    "a rule that stands twice": (set_at(f"{RULES}.1.policy", "DeleteCluster"), "two rules to DeleteCluster when SUCCEEDED"),
    "workers deleted after their cluster": (lambda d: d["spec"]["deletionStrategy"]["deletionRules"].append(DELETE_WORKERS_LATE), "not deleted in this order: [61, 60"),
    "a failed job kept for two times": (set_at(f"{RULES}.6.condition.ttlSeconds", 300), "DeleteCluster 3600 s after FAILED and 300 s after Failed"),
    "a group's patience without its autoscaler": (set_at(f"{GROUP}.idleTimeoutSeconds", 60), "wants autoscalerOptions.version v2"),
    "an upgrade of a job's cluster": (set_at("spec.rayClusterSpec.upgradeStrategy", {"type": "Recreate"}), "upgradeStrategy of the cluster in a RayJob"),
    "tokens of Kubernetes for a job": (set_at("spec.rayClusterSpec.authOptions.enableK8sTokenAuth", True), "enableK8sTokenAuth in a RayJob"),
    "a variable in the entrypoint": (set_at("spec.entrypoint", "python -m jobs.train $RUN"), "entrypoint has $"),
    "a command in the runtime environment": (set_at("spec.runtimeEnvYAML", "env_vars: {A: `id`}"), "runtimeEnvYAML has `"),
}  # fmt: skip

OPTIONS = "spec.upgradeStrategy.clusterUpgradeOptions"
SERVICE: Mapping[str, tuple[Break, str]] = {
    "a name that is too long": (set_at("metadata.name", "t" * 48), "48 characters, a RayService at most 47"),
    "an upgrade of no known kind": (set_at("spec.upgradeStrategy.type", "Rolling"), "Rolling is none of"),
    "a negative delay": (set_at("spec.rayClusterDeletionDelaySeconds", -1), "rayClusterDeletionDelaySeconds is negative"),
    "a head's service with a name": (set_at("spec.rayClusterConfig.headGroupSpec.headService", {"metadata": {"name": "x"}}), "headService has a name"),
    "a timeout that is no duration": (set_at("metadata.annotations", {"ray.io/initializing-timeout": "soon"}), "no positive duration"),
    "an incremental upgrade without the autoscaler": (set_at("spec.rayClusterConfig.enableInTreeAutoscaling", False), "needs enableInTreeAutoscaling"),
    "an incremental upgrade without options": (without(OPTIONS), "needs clusterUpgradeOptions"),
    "steps larger than the surge": (set_at(f"{OPTIONS}.stepSizePercent", 60), "stepSizePercent 60 is not between 0 and maxSurgePercent 50"),
    "too large a surge": (set_at(f"{OPTIONS}.maxSurgePercent", 101), "maxSurgePercent 101"),
    "no interval": (set_at(f"{OPTIONS}.intervalSeconds", 0), "intervalSeconds is not positive"),
    "no class of gateways": (set_at(f"{OPTIONS}.gatewayClassName", ""), "needs gatewayClassName"),
    "a Redis password by environment": (add_env("REDIS_PASSWORD", "x"), "REDIS_PASSWORD in the head's env"),
    "a Redis address by environment": (add_env("RAY_REDIS_ADDRESS", "x"), "RAY_REDIS_ADDRESS in the head's env"),
    "a Redis user by environment": (add_env("REDIS_USERNAME", "x"), "a redis username stands in"),
    "a Redis password as a start parameter": (set_at("spec.rayClusterConfig.headGroupSpec.rayStartParams.redis-password", "x"), "redis-password in rayStartParams"),
    "fault tolerance by annotation": (set_at("metadata.annotations", {"ray.io/ft-enabled": "true"}), "annotation ray.io/ft-enabled"),
    "a namespace by annotation": (set_at("metadata.annotations", {"ray.io/external-storage-namespace": "x"}), "external-storage-namespace"),
    "embedded storage": (set_at("spec.rayClusterConfig.gcsFaultToleranceOptions.backend", "rocksdb"), "rocksdb is behind a feature gate"),
}  # fmt: skip


def _broken(document: Manifest, change: Break) -> Manifest:
    changed = copy.deepcopy(document)
    change(changed)
    return changed


@pytest.mark.parametrize("rule", JOB)
def test_the_operators_rules_for_jobs(rule: str, build: Build) -> None:
    change, expected = JOB[rule]
    (job,) = of_kind(build(K8S / "base" / "train"), "RayJob")
    assert operator_rules.problems(job) == []
    assert expected in "\n".join(operator_rules.problems(_broken(job, change)))


@pytest.mark.parametrize("rule", SERVICE)
def test_the_operators_rules_for_services(rule: str, build: Build) -> None:
    change, expected = SERVICE[rule]
    (service,) = of_kind(build(K8S / "overlays" / "gpu"), "RayService")
    assert operator_rules.problems(service) == []
    assert expected in "\n".join(operator_rules.problems(_broken(service, change)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_at("spec.entryPoint", "x"), "entryPoint"),
        (set_at("spec.backoffLimit", "3"), "backoffLimit"),
        (set_at(f"{GROUP}.template.spec.containers.0.resources.limit", {}), "limit"),
        (set_at(f"{GROUP}.template.spec.containers.0.env.0.valueFrom.secretRef", {}), "secretRef"),
        (set_at(f"{HEAD}.template.metadata.labls", {}), "labls"),
        (without(f"{GROUP}.groupName"), "groupName"),
        (set_at(f"{RULES}.0.policy", "DeleteAll"), "DeleteAll"),
    ],
)
def test_a_field_that_the_server_would_prune_or_refuse_is_an_error(
    change: Break, expected: str, build: Build, crds: dict[str, Any]
) -> None:
    (job,) = of_kind(build(K8S / "base" / "train"), "RayJob")
    assert expected in "\n".join(schemas.problems(_broken(job, change), crds))


def test_unknown_fields_and_kinds_of_kubernetes_itself_are_errors_too(build: Build, crds: dict[str, Any]) -> None:
    (redis,) = of_kind(build(K8S / "base"), "StatefulSet")
    assert list(schemas.problems(_broken(redis, set_at("spec.replica", 1)), crds))
    assert list(schemas.problems(_broken(redis, set_at("kind", "StatefullSet")), crds))


POD = "spec.template.spec"
UNSAFE: Mapping[str, tuple[Break, str]] = {
    "root": (set_at(f"{POD}.securityContext.runAsNonRoot", False), "runs as root"),
    "no seccomp": (without(f"{POD}.securityContext.seccompProfile"), "no seccomp profile"),
    "the node's network": (set_at(f"{POD}.hostNetwork", True), "shares the node's hostNetwork"),
    "the node's files": (set_at(f"{POD}.volumes", [{"name": "root", "hostPath": {"path": "/"}}]), "volume root is the node's"),
    "a token": (without(f"{POD}.automountServiceAccountToken"), "token of the Kubernetes API"),
    "privilege": (set_at(f"{POD}.containers.0.securityContext.privileged", True), "is privileged"),
    "gaining privilege": (without(f"{POD}.containers.0.securityContext.allowPrivilegeEscalation"), "may gain privileges"),
    "a writable root": (without(f"{POD}.containers.0.securityContext.readOnlyRootFilesystem"), "can write its root"),
    "capabilities": (set_at(f"{POD}.containers.0.securityContext.capabilities.add", ["NET_ADMIN"]), "keeps capabilities"),
    "no limit": (without(f"{POD}.containers.0.resources.limits"), "resources.limits has no cpu"),
    "more memory than asked for": (set_at(f"{POD}.containers.0.resources.limits.memory", "9Gi"), "asks for less memory"),
    "no probe": (without(f"{POD}.containers.0.livenessProbe"), "has no livenessProbe"),
    "latest": (set_at(f"{POD}.containers.0.image", "valkey/valkey:latest"), "another one tomorrow"),
    "no tag": (set_at(f"{POD}.containers.0.image", "valkey/valkey"), "neither tag nor digest"),
}  # fmt: skip


@pytest.mark.parametrize("rule", UNSAFE)
def test_what_is_unsafe_in_a_pod_is_told(rule: str, build: Build) -> None:
    change, expected = UNSAFE[rule]
    documents = build(K8S / "base")
    broken = [_broken(d, change) if d["kind"] == "StatefulSet" else d for d in documents]
    assert security.problems(documents) == []
    assert expected in "\n".join(security.problems(broken))


WORKER = f"{GROUP}.template.spec.containers.0"
UNFIT: Mapping[str, tuple[Break, str]] = {
    "no token authentication": (without("spec.rayClusterSpec.authOptions"), "token authentication is not on"),
    "a head with work": (without(f"{HEAD}.rayStartParams.num-cpus"), "the head takes work"),
    "no shared memory": (set_at(f"{GROUP}.template.spec.volumes.3", {"name": "shared-memory", "emptyDir": {}}), "no shared memory"),
    "fewer pods waited for than wanted": (set_at(f"{GROUP}.replicas", 3), "LORAY_WORKER_PODS is ['2'], and there are 3 replicas"),
    "no disk asked for": (set_at(f"{WORKER}.resources.requests", {"cpu": "1", "memory": "6Gi"}), "asks for no disk"),
    "no place to write": (set_at(f"{WORKER}.volumeMounts.0.mountPath", "/data"), "cannot write where"),
    "no way to leave": (without(f"{WORKER}.lifecycle"), "does not leave the cluster in order"),
    "an object store larger than its memory": (set_at(f"{GROUP}.rayStartParams.object-store-memory", "2147483649"), "object-store-memory is 2147483649, and /dev/shm has 2Gi"),
    "an object store of any size": (without(f"{HEAD}.rayStartParams.object-store-memory"), "object-store-memory is 0"),
    "a head that may be evicted": (set_at(f"{HEAD}.template.metadata.annotations", {}), "the head may be evicted"),
    "no time to leave": (set_at(f"{GROUP}.template.spec.terminationGracePeriodSeconds", 120), "killed while it is still leaving"),
}  # fmt: skip


@pytest.mark.parametrize("rule", UNFIT)
def test_what_a_ray_node_lacks_is_told(rule: str, build: Build) -> None:
    change, expected = UNFIT[rule]
    documents = [*build(K8S / "base"), *build(K8S / "base" / "train")]
    broken = [_broken(d, change) if d["kind"] == "RayJob" else d for d in documents]
    assert security.problems(documents) == []
    assert expected in "\n".join(security.problems(broken))


SERVE_HEAD = "spec.rayClusterConfig.headGroupSpec.template.spec"
TOKEN_MOUNT = {"name": "api-token", "mountPath": "/token"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_at(f"{SERVE_HEAD}.automountServiceAccountToken", True), "has a token of the Kubernetes API that it does not need"),
        (set_at(f"{SERVE_HEAD}.containers.0.volumeMounts.0", TOKEN_MOUNT), "ray-head: has a token of the Kubernetes API"),
        (without("spec.rayClusterConfig.autoscalerOptions.volumeMounts"), "autoscaler: has no token"),
        (without("spec.rayClusterConfig.autoscalerOptions.securityContext"), "autoscaler: may gain privileges"),
    ],
)  # fmt: skip
def test_a_token_is_the_autoscalers_alone(change: Break, expected: str, build: Build) -> None:
    documents = build(K8S / "overlays" / "gpu")
    broken = [_broken(d, change) if d["kind"] == "RayService" else d for d in documents]
    assert security.problems(documents) == []
    assert expected in "\n".join(security.problems(broken))


def test_pods_without_a_policy_are_told_and_are_open(build: Build) -> None:
    documents = [d for d in build(K8S / "base") if d["kind"] != "NetworkPolicy"]
    assert "is open by default to Ingress" in "\n".join(security.problems(documents))
    head = End({"loray.io/part": "serve", "ray.io/node-type": "head"})
    assert allowed(documents, End({}, namespace="shop"), head, 8265)


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("RayService", set_at("spec.rayClusterConfig.headGroupSpec.template.spec.serviceAccountName", "who"), "no ServiceAccount who"),
        ("RayService", set_at("spec.rayClusterConfig.headGroupSpec.template.spec.priorityClassName", "top"), "no PriorityClass top"),
        ("RayService", set_at("spec.rayClusterConfig.headGroupSpec.template.spec.volumes.4.secret.secretName", "keyz"), "nothing makes the Secret keyz"),
        ("RayService", set_at("spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.envFrom.0.configMapRef.name", "env"), "no ConfigMap env"),
        ("RayService", set_at("spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.env.0.valueFrom.secretKeyRef.key", "ID"), "loray-s3 with a key ID"),
        ("RayService", set_at("spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.volumeMounts.0.name", "temp"), "no volume temp"),
        ("RayService", set_at("spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.readinessProbe.httpGet.port", "http"), "readinessProbe asks for port http"),
        ("RayService", set_at("spec.rayClusterConfig.gcsFaultToleranceOptions.redisAddress", "redis://redis:6380"), "no Service redis listens on 6380"),
        ("RayService", add_env("AWS_ACCESS_KEY_ID", "x"), "AWS_ACCESS_KEY_ID stands twice"),
        ("StatefulSet", set_at("spec.serviceName", "reddis"), "no Service reddis"),
        ("Service", set_at("spec.ports.0.targetPort", "resp"), "no port resp"),
        ("Service", set_at("spec.selector", {"app": "redis"}), "selects no pod"),
        ("RoleBinding", set_at("roleRef.name", "admin"), "no Role admin"),
        ("PodDisruptionBudget", set_at("spec.selector.matchLabels", {"loray.io/part": "x"}), "engines selects no pod"),
        ("PodDisruptionBudget", set_at("spec.maxUnavailable", 1), "maxUnavailable, which allows nothing"),
        ("ServiceMonitor", set_at("spec.endpoints.0.port", "http"), "heads have no port http"),
        ("RayService", set_at("spec.upgradeStrategy.type", "NewCluster"), "loray-gateway selects no pod"),
        ("LocalQueue", set_at("spec.clusterQueue", "all"), "no ClusterQueue all"),
        ("ClusterQueue", set_at("spec.resourceGroups.0.flavors.0.name", "tpu"), "no ResourceFlavor tpu"),
    ],
)  # fmt: skip
def test_a_name_that_nothing_answers_to_is_told(kind: str, change: Break, expected: str, build: Build) -> None:
    documents = [*build(K8S / "overlays" / "kueue"), *build(K8S / "overlays" / "kueue" / "train")]
    secrets = {
        "loray-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
        "loray-hub": {"token"},
        "loray-redis": {"password"},
        "loray-api-keys": {"keys.yaml"},
        "loray-metrics-key": {"secret"},
    }
    broken = [_broken(d, change) if d["kind"] == kind else d for d in documents]
    before = references.problems(documents, secrets)
    found = references.problems(broken, secrets)
    assert len(found) > len(before)
    assert expected in "\n".join(found)
