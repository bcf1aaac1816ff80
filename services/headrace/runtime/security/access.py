"""List which scope each RPC of each service requires, and each path of the gateway.

Guards use it after they have found who calls. This module does not know how that is found.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from headrace.runtime.security.identity import Scope

ServiceName: TypeAlias = Literal["router", "batcher", "worker", "gateway"]

_HEALTH = "/grpc.health.v1.Health/"
_FEEDBACK = "/headrace.v1.RoutingService/Feedback"
_CALLS = (
    "/headrace.v1.GenerationService/",
    "/headrace.v1.RoutingService/",
    "/headrace.v1.TokenizerService/",
)
_WORKER = "/headrace.v1.WorkerService/"
_QUOTAS = "/headrace.v1.QuotaService/"  # between routers
# Of the gateway: the page has no secrets, and asks for a token itself.
_OPEN_PATHS = ("/", "/health", "/health/live")
_API_PATHS = ("/v1/", "/tokenize", "/detokenize")


def credential_settings(service: ServiceName) -> str:
    """Return the settings by which an operator gives a service's callers credentials."""
    if service == "gateway":
        return "--auth-tokens or --auth-jwks"
    return "--auth-tokens, --auth-jwks or --tls-ca"


def required_scope(service: ServiceName, method: str) -> Scope | None:
    """Return the scope that a caller of *method* needs at a service; None if everybody may call it.

    method   such as "/headrace.v1.GenerationService/Generate"; of a gateway, the path of the route

    Health is open: probes have no credentials. What is not listed, such as Inspect, reflection, channelz and
    the metrics of a gateway, is for administrators.
    """
    if service == "gateway":
        if method in _OPEN_PATHS:
            return None
        return "generate" if method.startswith(_API_PATHS) else "admin"
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
