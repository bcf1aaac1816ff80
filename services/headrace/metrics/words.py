"""Define the labels of metrics and their values: one word for one thing, in all services.

`outcome_of` turns an error into one of them.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from headrace import attributes, errors

# The labels of metrics, and their names as attributes in OpenTelemetry. In Prometheus, "." is "_".
LABELS: Final = {
    "tier": attributes.TIER,
    "model": attributes.GEN_AI_REQUEST_MODEL,
    "operation": attributes.GEN_AI_OPERATION,
    "provider": attributes.GEN_AI_PROVIDER,
    "error": attributes.ERROR_TYPE,
    "outcome": attributes.OUTCOME,
    "finish": attributes.FINISH_REASON,
    "stage": attributes.QUEUE_STAGE,
    "cause": attributes.WASTE_CAUSE,
    "route": attributes.ROUTE_CAUSE,
    "verdict": attributes.VERDICT,
    "kind": attributes.TOKEN_KIND,
    "source": attributes.TOKEN_SOURCE,
    "credit": attributes.CREDIT_KIND,
    "state": attributes.STATE,
    "tenant": attributes.TENANT,
    "tenant_class": attributes.TENANT_CLASS,
    "limit": attributes.QUOTA_LIMIT,
    "mode": attributes.QUOTA_MODE,
    "arm": attributes.ARM,
    "measure": attributes.CANARY_MEASURE,
    "bound": attributes.SHADOW_BOUND,
    "rpc_system": attributes.RPC_SYSTEM,
    "method": attributes.RPC_METHOD,
    "status": attributes.RPC_STATUS_CODE,
    "http_method": attributes.HTTP_METHOD,
    "http_route": attributes.HTTP_ROUTE,
    "http_status": attributes.HTTP_STATUS_CODE,
    "scheme": attributes.URL_SCHEME,
    "server": attributes.SERVER_ADDRESS,
}
OTHER: Final = "other"  # the value of a label beyond its bound
PROVIDER: Final = "headrace"  # the value of gen_ai.provider.name

# How a request, a wait or a sequence ended: completely; because the caller left; because its deadline passed;
# because it was not admitted, was shed, or must go elsewhere; because the request is wrong; for any other
# reason. `error.type` has the reason in detail.
Outcome: TypeAlias = Literal["ok", "cancelled", "deadline", "refused", "invalid", "failed"]

_REFUSED = (
    errors.Overloaded,
    errors.TtftUnattainable,
    errors.DeadlineUnattainable,
    errors.CredentialsRequired,
    errors.CredentialsInvalid,
    errors.Forbidden,
    errors.Draining,
    errors.WorkerDraining,
    errors.NotReady,
)
_INVALID = (errors.InvalidRequest, errors.UnknownRequest, errors.AlreadyRated, errors.MessageTooLarge)


def outcome_of(kind: type[errors.HeadraceError]) -> Outcome:
    """Return the outcome of a request that ended with an error of a class."""
    if issubclass(kind, errors.RequestCancelled):
        return "cancelled"
    if issubclass(kind, errors.SlowReader):
        return "failed"
    if issubclass(kind, _REFUSED):
        return "refused"
    if issubclass(kind, errors.DeadlineExceeded):
        return "deadline"
    return "invalid" if issubclass(kind, _INVALID) else "failed"
