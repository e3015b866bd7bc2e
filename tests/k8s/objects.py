"""Kubernetes objects as dictionaries: their names, and the pods that will be made from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Manifest = dict[str, Any]

RAY_KINDS = ("RayCluster", "RayJob", "RayService")


@dataclass(frozen=True)
class Pod:
    """A pod as it will be: `labels` are those that the operator adds too, `spec` is the pod's own."""

    where: str
    labels: Mapping[str, str]
    spec: Manifest
    ray: str = ""  # head, worker, or "" for one without Ray

    @property
    def containers(self) -> list[Manifest]:
        """All of them, those that only begin included."""
        return [*self.spec["containers"], *self.spec.get("initContainers", ())]


def called(document: Manifest) -> str:
    """`RayJob tickets`."""
    return f"{document['kind']} {document['metadata']['name']}"


def of_kind(documents: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    """Those of these kinds."""
    return [document for document in documents if document["kind"] in kinds]


def cluster_spec(document: Manifest) -> Manifest:
    """The RayCluster's spec inside a RayJob, RayService or RayCluster."""
    spec: Manifest = document["spec"]
    return dict(spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec)


def groups(document: Manifest) -> Iterator[tuple[str, Manifest]]:
    """The head's group and the workers', by name."""
    cluster = cluster_spec(document)
    yield "headgroup", cluster["headGroupSpec"]
    for group in cluster.get("workerGroupSpecs", ()):
        yield group["groupName"], group


def gateway_pods(documents: Sequence[Manifest]) -> Iterator[Mapping[str, str]]:
    """Labels of the proxies that others run in our namespace for the Gateway of an endpoint whose traffic moves step by step."""
    for service in of_kind(documents, "RayService"):
        if service["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade":
            yield {"gateway.networking.k8s.io/gateway-name": f"{service['metadata']['name']}-gateway"}


def pods(documents: Sequence[Manifest]) -> Iterator[Pod]:
    """Every pod that these documents ask for, one of each kind."""
    for document in documents:
        if document["kind"] in RAY_KINDS:
            yield from _ray_pods(document)
        elif document["kind"] in ("StatefulSet", "Deployment", "Job", "DaemonSet"):
            template = document["spec"]["template"]
            yield Pod(called(document), template["metadata"]["labels"], template["spec"])


def _ray_pods(document: Manifest) -> Iterator[Pod]:
    for name, group in groups(document):
        kind = "head" if name == "headgroup" else "worker"
        added = {"ray.io/is-ray-node": "yes", "ray.io/node-type": kind, "ray.io/group": name}
        template = group["template"]
        labels = {**template.get("metadata", {}).get("labels", {}), **added}
        yield Pod(f"{called(document)}, {name}", labels, template["spec"], kind)
