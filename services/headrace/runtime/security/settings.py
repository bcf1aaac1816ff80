"""The settings that decide who may call a server."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings

_JWKS, _ISSUER, _AUDIENCE = (
    f"HEADRACE_AUTH_{name.upper()} (or --auth-{name})" for name in ("jwks", "issuer", "audience")
)


class AuthSettings(BaseSettings):
    """Who may call a server. Secrets are read from files; no setting holds one."""

    auth_tokens: Path | None = Field(
        default=None,
        description="TOML file of callers: hashes of bearer tokens, which `headrace token` makes, and names "
        "in client certificates, each with tenant, scopes and limits; it is read again when it changes",
    )
    auth_jwks: str = Field(
        default="",
        description="file or https URL of the public keys (JWKS) that sign the JWTs of callers; it is read "
        "again when it changes, a URL every five minutes and for an unknown key",
    )
    auth_issuer: str = Field(default="", description="required claim `iss` of JWTs")
    auth_audience: str = Field(default="", description="required claim `aud` of JWTs")
    auth_tenant_claim: str = Field(
        default="tenant",
        min_length=1,
        description="claim of JWTs that names the tenant, such as tenant or sub; a JWT without it is refused",
    )
    auth_anonymous: Literal["auto", "allow", "deny"] = Field(
        default="auto",
        description="whether callers without credentials are served; auto allows it if --host is loopback "
        "and no credentials are configured",
    )
    auth_reflection: Literal["admin", "open"] = Field(
        default="admin",
        description="who may use reflection when credentials are configured: callers with the scope admin, "
        "or all callers that are served",
    )

    @model_validator(mode="after")
    def _jwts_are_bound(self) -> Self:
        if self.auth_jwks and not (self.auth_issuer and self.auth_audience):
            raise ValueError(
                f"{_JWKS} needs {_ISSUER} and {_AUDIENCE}: without them, JWTs that were issued for other "
                "services would be accepted"
            )
        if not self.auth_jwks and (self.auth_issuer or self.auth_audience):
            raise ValueError(f"{_ISSUER} and {_AUDIENCE} have no effect without {_JWKS}")
        if problem := _url_problem(self.auth_jwks):
            raise ValueError(f"{_JWKS}: {problem}")
        return self


def serves_anonymous(settings: AuthSettings, host: str, *, configured: bool) -> bool:
    """Return whether a server on *host* serves callers without credentials.

    configured   whether credentials are configured
    """
    if settings.auth_anonymous == "auto":
        return not configured and only_loopback(host)
    return settings.auth_anonymous == "allow"


def is_url(source: str) -> bool:
    """Return whether a JWKS is fetched rather than read from a file."""
    return "://" in source


def _url_problem(source: str) -> str:
    if not is_url(source):
        return ""
    try:
        parts = urlsplit(source)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError:
        return "it is not a URL"
    if parts.username is not None or parts.password is not None:
        return "the URL contains credentials; keys that verify JWTs are public"
    if parts.scheme == "https" and host:
        return ""
    if parts.scheme == "http" and only_loopback(host):
        return ""
    return "the URL must start with https://; http:// is accepted for loopback addresses only"


def only_loopback(host: str) -> bool:
    """Return whether only processes of this machine reach a server on *host*. Names are not resolved.

    Stricter than `headrace.channel.is_loopback`, for which 0.0.0.0 is this machine, as it is for a caller.
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
