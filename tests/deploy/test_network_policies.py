"""The NetworkPolicies allow what the mesh needs, and nothing else.

They are evaluated here as the specification defines: a connection is allowed if an egress rule of its source
and an ingress rule of its destination allow it; a pod that no policy selects is open.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.rendering import OF_OVERLAYS, Resource, combined, of_kind

NAMESPACE = "headrace"


@dataclass(frozen=True)
class Peer:
    """One end of a connection: a pod, or an address outside of the cluster."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = NAMESPACE
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    address: str = ""


def service(name: str, port: int) -> Peer:
    """Return a pod of the mesh."""
    return Peer({"app.kubernetes.io/name": name}, ports={"grpc": port, "metrics": 9464, "otlp": 4317})


ROUTER, BATCHER, WORKER = service("router", 50051), service("batcher", 50052), service("worker", 50053)
GATEWAY = Peer({"app.kubernetes.io/name": "gateway"}, ports={"http": 8080, "metrics": 9464, "otlp": 4317})
UPSTREAM = service("upstream", 50054)
LEADER, RANK = (
    Peer({"app.kubernetes.io/name": name, "headrace/multinode": "true"}, ports={"grpc": 50053})
    for name in ("worker", "worker-rank")
)
COLLECTOR, PREFETCH = service("otel-collector", 4317), service("prefetch", 0)
STRANGER = Peer({"app": "shell"}, namespace="other")
NEIGHBOUR = Peer({"app": "shell"})  # in the namespace of the mesh
CALLER = Peer({"app": "shop"}, namespace="shop", namespace_labels={"headrace/callers": "allowed"})
INNER_CALLER = Peer({"headrace/callers": "allowed"})
PROMETHEUS = Peer({"app": "prometheus"}, "monitoring", {"kubernetes.io/metadata.name": "monitoring"})
TEMPO = PROMETHEUS
DNS = Peer({"k8s-app": "kube-dns"}, "kube-system", {"kubernetes.io/metadata.name": "kube-system"})
HUB = Peer(namespace="", address="203.0.113.7")
METADATA = Peer(namespace="", address="169.254.169.254")  # where clouds hand out credentials

ALLOWED = [
    (CALLER, GATEWAY, 8080),
    (INNER_CALLER, GATEWAY, 8080),
    (GATEWAY, ROUTER, 50051),
    (CALLER, ROUTER, 50051),
    (INNER_CALLER, ROUTER, 50051),
    (ROUTER, ROUTER, 50051),
    (ROUTER, ROUTER, 50056),
    (ROUTER, BATCHER, 50052),
    (BATCHER, WORKER, 50053),
    (PROMETHEUS, GATEWAY, 9464),
    (PROMETHEUS, ROUTER, 9464),
    (PROMETHEUS, BATCHER, 9464),
    (PROMETHEUS, WORKER, 9464),
    (GATEWAY, COLLECTOR, 4317),
    (ROUTER, COLLECTOR, 4317),
    (BATCHER, COLLECTOR, 4317),
    (WORKER, COLLECTOR, 4317),
    (COLLECTOR, TEMPO, 4317),
    (ROUTER, UPSTREAM, 50054),
    (UPSTREAM, HUB, 443),
    (PROMETHEUS, UPSTREAM, 9464),
    (UPSTREAM, COLLECTOR, 4317),
    (BATCHER, HUB, 443),
    (WORKER, HUB, 443),
    (PREFETCH, HUB, 443),
]
PEERS = {
    "gateway": GATEWAY,
    "router": ROUTER,
    "batcher": BATCHER,
    "upstream": UPSTREAM,
    "worker": WORKER,
    "collector": COLLECTOR,
    "prefetch": PREFETCH,
    "stranger": STRANGER,
    "neighbour": NEIGHBOUR,
    "caller": CALLER,
    "inner caller": INNER_CALLER,
    "prometheus": PROMETHEUS,
    "hub": HUB,
    "metadata": METADATA,
}
PORTS = (443, 4317, 8080, 9464, 50051, 50052, 50053, 50054, 50055, 50056)


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Return whether a label selector matches; an empty one matches everything."""
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def matches(entry: Mapping[str, Any], peer: Peer) -> bool:
    """Return whether an entry of `from` or `to` means *peer*."""
    if block := entry.get("ipBlock"):
        if not peer.address:
            return False
        address = ipaddress.ip_address(peer.address)
        inside = address in ipaddress.ip_network(block["cidr"])
        return inside and not any(address in ipaddress.ip_network(each) for each in block.get("except", ()))
    if peer.address:
        return False
    if "namespaceSelector" in entry:
        if not selects(entry["namespaceSelector"], peer.namespace_labels):
            return False
    elif peer.namespace != NAMESPACE:
        return False
    return "podSelector" not in entry or selects(entry["podSelector"], peer.labels)


def matches_port(entry: Mapping[str, Any], port: int, named: Mapping[str, int]) -> bool:
    """Return whether an entry of `ports` has *port*: its number, its name, or a range."""
    first = named.get(entry["port"], entry["port"])
    return first == port or ("endPort" in entry and first <= port <= entry["endPort"])


def direction_allows(
    policies: Iterable[Resource], kind: str, pod: Peer, other: Peer, port: int, named: Mapping[str, int]
) -> bool:
    """Return whether the policies of *pod* allow the connection in one direction."""
    if pod.address or pod.namespace != NAMESPACE:
        return True
    applying = [
        policy["spec"]
        for policy in policies
        if kind in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    key = "from" if kind == "Ingress" else "to"
    return not applying or any(
        any(matches(entry, other) for entry in rule[key])
        and any(matches_port(each, port, named) for each in rule["ports"])
        for spec in applying
        for rule in spec.get(kind.lower(), ())
    )


def allows(policies: Iterable[Resource], source: Peer, target: Peer, port: int) -> bool:
    """Return whether *source* may connect to *port* of *target*."""
    policies = list(policies)
    return direction_allows(policies, "Egress", source, target, port, target.ports) and direction_allows(
        policies, "Ingress", target, source, port, target.ports
    )


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[Resource]:
    found = combined(tmp_path_factory.mktemp("policies"), OF_OVERLAYS)
    return list(of_kind(found, "NetworkPolicy").values())


@pytest.mark.parametrize(("source", "target", "port"), ALLOWED)
def test_what_the_mesh_needs_is_allowed(
    policies: list[Resource], source: Peer, target: Peer, port: int
) -> None:
    assert allows(policies, source, target, port)


def test_the_pods_of_a_group_reach_each_other_on_any_port_and_others_do_not(
    policies: list[Resource],
) -> None:
    for port in (29501, 40000):
        assert allows(policies, LEADER, RANK, port)
        assert allows(policies, RANK, LEADER, port)
        for other in (WORKER, BATCHER, NEIGHBOUR, STRANGER):
            assert not allows(policies, other, RANK, port)
            assert not allows(policies, RANK, other, port)
    assert allows(policies, BATCHER, LEADER, 50053)
    assert not allows(policies, BATCHER, RANK, 50053)
    assert allows(policies, RANK, HUB, 443)


@pytest.mark.parametrize(
    "name", ["gateway", "router", "batcher", "upstream", "worker", "collector", "prefetch"]
)
def test_pods_may_resolve_names(policies: list[Resource], name: str) -> None:
    assert allows(policies, PEERS[name], DNS, 53)


def test_nothing_else_is_allowed(policies: list[Resource]) -> None:
    found = {
        (one, other, port)
        for one, source in PEERS.items()
        for other, target in PEERS.items()
        for port in PORTS
        if NAMESPACE in (source.namespace, target.namespace) and allows(policies, source, target, port)
    }
    names = {id(peer): name for name, peer in PEERS.items()}

    assert found == {(names[id(source)], names[id(target)], port) for source, target, port in ALLOWED}


def test_without_policies_everything_is_allowed() -> None:
    """The evaluation would otherwise find that nothing is allowed because it allows nothing."""
    assert allows([], STRANGER, WORKER, 50053)


def test_policies_are_in_the_overlays_that_are_not_for_trials(tmp_path: Path) -> None:
    from tests.deploy.rendering import overlay

    assert not of_kind(overlay("local"), "NetworkPolicy")
    for name in ("cpu", "gpu", "gpu-vllm"):
        assert {"deny", "gateway", "router", "batcher", "upstream", "worker"} <= set(
            of_kind(overlay(name), "NetworkPolicy")
        )
