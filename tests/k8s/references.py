"""Whether everything that a document names is there: ConfigMaps, Secrets and their keys, accounts, classes, volumes, ports.

`documents` are all that lie in one cluster together; `secrets` those that its operator makes by hand, with their keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.k8s.objects import Manifest, Pod, called, cluster_spec, gateway_pods, of_kind, pods

Secrets = Mapping[str, set[str]]


def problems(documents: Sequence[Manifest], secrets: Secrets) -> list[str]:
    """A line for each name that nothing answers to."""
    return [
        *(line for pod in pods(documents) for line in _pod(pod, documents, secrets)),
        *_services(documents),
        *_roles(documents),
        *_fault_tolerance(documents, secrets),
        *_selectors(documents),
        *_monitors(documents, secrets),
        *_queues(documents),
    ]


def names(documents: Sequence[Manifest], kind: str) -> set[str]:
    """Of all documents of a kind."""
    return {document["metadata"]["name"] for document in of_kind(documents, kind)}


def matches(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels; an empty one takes all."""
    wanted = selector.get("matchLabels", {})
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In", expression
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def _pod(pod: Pod, documents: Sequence[Manifest], secrets: Secrets) -> Iterator[str]:
    spec = pod.spec
    account = spec.get("serviceAccountName")
    if account and account not in names(documents, "ServiceAccount"):
        yield f"{pod.where}: there is no ServiceAccount {account}"
    priority = spec.get("priorityClassName")
    if priority and priority not in names(documents, "PriorityClass"):
        yield f"{pod.where}: there is no PriorityClass {priority}"
    volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
    claims = {
        claim["metadata"]["name"] for d in documents for claim in d.get("spec", {}).get("volumeClaimTemplates", ())
    }
    for volume in volumes.values():
        yield from (f"{pod.where}: {line}" for line in _source(volume, documents, secrets))
    for container in pod.containers:
        where = f"{pod.where}, {container['name']}"
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        yield from (f"{where}: there is no volume {name}" for name in sorted(mounted - set(volumes) - claims))
        yield from (f"{where}: {line}" for line in _container(container, documents, secrets))


def _source(volume: Manifest, documents: Sequence[Manifest], secrets: Secrets) -> Iterator[str]:
    if "configMap" in volume and volume["configMap"]["name"] not in names(documents, "ConfigMap"):
        yield f"there is no ConfigMap {volume['configMap']['name']}"
    if "secret" in volume and volume["secret"]["secretName"] not in secrets:
        yield f"nothing makes the Secret {volume['secret']['secretName']}"


def _container(container: Manifest, documents: Sequence[Manifest], secrets: Secrets) -> Iterator[str]:
    maps = {document["metadata"]["name"]: document["data"] for document in of_kind(documents, "ConfigMap")}
    for source in container.get("envFrom", ()):
        name = source["configMapRef"]["name"]
        if name not in maps:
            yield f"there is no ConfigMap {name}"
    entries = [entry["name"] for entry in container.get("env", ())]
    yield from (f"{name} stands twice in env" for name in sorted({n for n in entries if entries.count(n) > 1}))
    for entry in container.get("env", ()):
        yield from _value(entry.get("valueFrom", {}), secrets)
    ports = {port["name"] for port in container.get("ports", ())}
    for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
        check = container.get(probe, {})
        port = (check.get("httpGet") or check.get("tcpSocket") or {}).get("port", 0)
        if isinstance(port, str) and port not in ports:
            yield f"{probe} asks for port {port}, and there are {sorted(ports)}"


def _value(source: Manifest, secrets: Secrets) -> Iterator[str]:
    ref = source.get("secretKeyRef")
    if ref and ref["key"] not in secrets.get(ref["name"], ()):
        yield f"nothing makes the Secret {ref['name']} with a key {ref['key']}"


def _services(documents: Sequence[Manifest]) -> Iterator[str]:
    for service in of_kind(documents, "Service"):
        taken = [pod for pod in pods(documents) if matches({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        if not taken:
            yield f"{called(service)} selects no pod"
        ports = {port["name"] for pod in taken for container in pod.containers for port in container.get("ports", ())}
        wanted = {port["targetPort"] for port in service["spec"]["ports"]}
        yield from (f"{called(service)}: its pods have no port {port}" for port in sorted(wanted - ports))
    for stateful in of_kind(documents, "StatefulSet"):
        if stateful["spec"]["serviceName"] not in names(documents, "Service"):
            yield f"{called(stateful)}: there is no Service {stateful['spec']['serviceName']}"
    for environment in of_kind(documents, "ConfigMap"):
        address = re.fullmatch(r"http://([^:/.]+):(\d+)", environment["data"].get("AWS_ENDPOINT_URL", ""))
        if address and not _listens(documents, address[1], int(address[2])):
            yield f"{called(environment)}: no Service {address[1]} listens on {address[2]}"


def _listens(documents: Sequence[Manifest], name: str, port: int) -> bool:
    found = [service for service in of_kind(documents, "Service") if service["metadata"]["name"] == name]
    return any(port == listed["port"] for service in found for listed in service["spec"]["ports"])


def _roles(documents: Sequence[Manifest]) -> Iterator[str]:
    for binding in of_kind(documents, "RoleBinding", "ClusterRoleBinding"):
        ref = binding["roleRef"]
        if ref["name"] not in names(documents, ref["kind"]):
            yield f"{called(binding)}: there is no {ref['kind']} {ref['name']}"


def _fault_tolerance(documents: Sequence[Manifest], secrets: Secrets) -> Iterator[str]:
    for document in of_kind(documents, "RayService", "RayCluster", "RayJob"):
        options = cluster_spec(document).get("gcsFaultToleranceOptions", {})
        address = re.fullmatch(r"redis://([^:/.]+):(\d+)", options.get("redisAddress", ""))
        if address and not _listens(documents, address[1], int(address[2])):
            yield f"{called(document)}: no Service {address[1]} listens on {address[2]}"
        for line in _value(options.get("redisPassword", {}).get("valueFrom", {}), secrets):
            yield f"{called(document)}: {line}"


def _selectors(documents: Sequence[Manifest]) -> Iterator[str]:
    """Policies and budgets that select nothing protect nothing."""
    there = [*(pod.labels for pod in pods(documents)), *gateway_pods(documents)]
    for document in of_kind(documents, "NetworkPolicy", "PodDisruptionBudget"):
        spec = document["spec"]
        selector = spec["podSelector"] if document["kind"] == "NetworkPolicy" else spec["selector"]
        if not any(matches(selector, labels) for labels in there):
            yield f"{called(document)} selects no pod"
        if "maxUnavailable" in spec:  # Ray's pods have owners without a scale subresource, whose number nobody can tell
            yield f"{called(document)} counts in maxUnavailable, which allows nothing"


def _monitors(documents: Sequence[Manifest], secrets: Secrets) -> Iterator[str]:
    heads = [pod for pod in pods(documents) if pod.ray == "head"]
    for monitor in of_kind(documents, "ServiceMonitor", "PodMonitor"):
        wanted: Any = monitor["spec"].get("endpoints") or monitor["spec"]["podMetricsEndpoints"]
        for endpoint in wanted:
            ports = {port["name"] for pod in heads for port in pod.spec["containers"][0]["ports"]}
            if endpoint["port"] not in ports:
                yield f"{called(monitor)}: heads have no port {endpoint['port']}"
            key = endpoint.get("authorization", {}).get("credentials", {})
            if key and key["key"] not in secrets.get(key["name"], ()):
                yield f"{called(monitor)}: nothing makes the Secret {key['name']} with a key {key['key']}"


def _queues(documents: Sequence[Manifest]) -> Iterator[str]:
    for queue in of_kind(documents, "LocalQueue"):
        if queue["spec"]["clusterQueue"] not in names(documents, "ClusterQueue"):
            yield f"{called(queue)}: there is no ClusterQueue {queue['spec']['clusterQueue']}"
    for cluster_queue in of_kind(documents, "ClusterQueue"):
        flavors = {flavor["name"] for group in cluster_queue["spec"]["resourceGroups"] for flavor in group["flavors"]}
        missing = flavors - names(documents, "ResourceFlavor")
        yield from (f"{called(cluster_queue)}: there is no ResourceFlavor {name}" for name in sorted(missing))
    for job in of_kind(documents, "RayJob"):
        queue_name = job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
        if queue_name and queue_name not in names(documents, "LocalQueue"):
            yield f"{called(job)}: there is no LocalQueue {queue_name}"
