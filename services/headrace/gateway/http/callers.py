"""Decide for whom a request is made."""

from __future__ import annotations

from headrace.gateway.problems import Problem
from headrace.runtime.security.identity import MAX_NAME, Identity, is_name

TENANT_HEADER = "x-headrace-tenant"


def tenant_of(identity: Identity, user: str | None, header: str | None = None) -> str:
    """Return the tenant of a request; empty if it names none. Raises Problem.

    identity   who calls; if it is bound to a tenant, this is the tenant, whatever the request says in `user`
    user       the field `user` of the request: an end user, in OpenAI's API
    header     the header x-headrace-tenant, which precedes `user`; refused if the identity has another tenant
    """
    for value, name in ((header, TENANT_HEADER), (user, "user")):
        if value and not is_name(value):
            raise Problem(
                400,
                f"{name} must have 1 to {MAX_NAME} printable characters",
                code="invalid_value",
                param=name,
            )
    if identity.tenant is None:
        return header or user or ""
    if header and header != identity.tenant:
        raise Problem(
            403,
            f"{identity.name} may not act for the tenant that {TENANT_HEADER} names",
            type="permission_error",
            code="forbidden",
            param=TENANT_HEADER,
        )
    return identity.tenant
