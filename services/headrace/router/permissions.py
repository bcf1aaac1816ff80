"""Apply what an identity may do to a request: its tenant, and its priority.

A tenant that the request leaves out is the identity's; another one than the identity's is refused. A priority
above the identity's limit is lowered to it, because a priority is a wish: the request is served as any other
of its tenant.
"""

from __future__ import annotations

from headrace import errors
from headrace.quoting import quoted
from headrace.runtime.security.identity import DEFAULT_PRIORITY, MAX_PRIORITY, Identity
from headrace.v1 import generation_pb2 as pb


def tenant_of(request: pb.GenerateRequest, identity: Identity) -> str:
    """Return the tenant that a request is accounted to, also if it names another one, which is refused."""
    return request.routing.tenant if identity.tenant is None else identity.tenant


def permit(request: pb.GenerateRequest, identity: Identity) -> None:
    """Set tenant and priority of *request* as the identity allows. Raises Forbidden."""
    if identity.tenant is not None:
        request.routing.tenant = permitted_tenant(request.routing.tenant, identity, field="routing.tenant")
    lower_priority(request, identity.max_priority)


def lower_priority(request: pb.GenerateRequest, most: int) -> None:
    """Lower the priority of a request to *most*, if it is higher."""
    if most < MAX_PRIORITY:  # else the message is not touched
        routing = request.routing
        if (routing.priority if routing.HasField("priority") else DEFAULT_PRIORITY) > most:
            routing.priority = most


def permitted_tenant(named: str, identity: Identity, *, field: str) -> str:
    """Return the tenant of a request that names the tenant *named*, or none. Raises Forbidden.

    field   the request's field, for the error
    """
    if identity.tenant is None or named == identity.tenant:
        return named
    if named:
        raise errors.Forbidden(
            f"{identity.name} may not act for the tenant {quoted(named)}: leave {field} out, or use the "
            "credentials of that tenant",
            field=field,
        )
    return identity.tenant


def sees_all_tenants(identity: Identity) -> bool:
    """Return whether a caller may know what all tenants together have used."""
    return identity.tenant is None or "admin" in identity.scopes
