"""List which scope each RPC of each service requires.

Guards use it after they have found who calls. This module does not know how that is found.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from headrace.runtime.security.identity import Scope

ServiceName: TypeAlias = Literal["router", "batcher", "worker"]

_HEALTH = "/grpc.health.v1.Health/"
_FEEDBACK = "/headrace.v1.RoutingService/Feedback"
_CALLS = (
    "/headrace.v1.GenerationService/",
    "/headrace.v1.RoutingService/",
    "/headrace.v1.TokenizerService/",
)
_WORKER = "/headrace.v1.WorkerService/"
_QUOTAS = "/headrace.v1.QuotaService/"  # between routers


def required_scope(service: ServiceName, method: str) -> Scope | None:
    """Return the scope that a caller of *method* needs at a service; None if everybody may call it.

    method   such as "/headrace.v1.GenerationService/Generate"

    Health is open: probes have no credentials. What is not listed, such as Inspect, reflection and channelz,
    is for administrators.
    """
    if method.startswith(_HEALTH):
        return None
    if service == "router" and method.startswith(_CALLS):
        return "feedback" if method == _FEEDBACK else "generate"
    if service == "router" and method.startswith(_QUOTAS):
        return "router"
    if service == "batcher" and method.startswith(_CALLS):
        return "router"
    if service == "worker" and method.startswith(_WORKER):
        return "batcher"
    return "admin"
