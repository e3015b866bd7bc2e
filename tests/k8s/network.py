"""Whether a connection is let through, by the NetworkPolicies of a set of documents, as Kubernetes defines them.

https://kubernetes.io/docs/concepts/services-networking/network-policies/: a pod that some policy selects for a direction is
closed in that direction but for what is allowed, by any of them; both ends must let a connection through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from tests.k8s.objects import Manifest, of_kind
from tests.k8s.references import matches


@dataclass(frozen=True)
class End:
    """One end of a connection: a pod of a namespace, or an address outside of the cluster."""

    labels: Mapping[str, str]
    namespace: str = "loray"
    address: str | None = None


def allowed(documents: Sequence[Manifest], source: End, target: End, port: int) -> bool:
    """Whether `source` can open a TCP connection to `port` of `target`."""
    policies = of_kind(documents, "NetworkPolicy")
    return _passes(policies, "Egress", source, target, port) and _passes(policies, "Ingress", target, source, port)


def _passes(policies: Sequence[Manifest], direction: str, here: End, there: End, port: int) -> bool:
    if here.address is not None:
        return True
    closing = [p for p in policies if direction in p["spec"]["policyTypes"] and _selects(p, here)]
    if not closing:
        return True
    key, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    rules = [rule for policy in closing for rule in policy["spec"].get(key, ())]
    return any(_rule_takes(rule, peers, here, there, port) for rule in rules)


def _selects(policy: Manifest, end: End) -> bool:
    return policy["metadata"]["namespace"] == end.namespace and matches(policy["spec"]["podSelector"], end.labels)


def _rule_takes(rule: Manifest, peers: str, here: End, there: End, port: int) -> bool:
    ports = rule.get("ports")
    if ports is not None and not any(p.get("protocol") == "TCP" and p["port"] == port for p in ports):
        return False
    return peers not in rule or any(_peer_takes(peer, here, there) for peer in rule[peers])


def _peer_takes(peer: Manifest, here: End, there: End) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        address = ip_address(there.address or "10.0.0.1")  # a pod has an address too
        inside = address in ip_network(block["cidr"])
        return inside and not any(address in ip_network(left_out) for left_out in block.get("except", ()))
    if there.address is not None:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": there.namespace}
        return matches(peer["namespaceSelector"], labels) and matches(peer.get("podSelector", {}), there.labels)
    return here.namespace == there.namespace and matches(peer["podSelector"], there.labels)
