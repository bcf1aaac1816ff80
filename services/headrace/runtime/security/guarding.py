"""Make the guard of a server from its settings, and keep its files up to date while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.channel import is_loopback
from headrace.runtime.security.access import ADMIN, AccessGuard, RoleOf, Rules
from headrace.runtime.security.callers_file import DEFAULT_PRIORITY, CallersFile, parse
from headrace.runtime.security.guard import Guard, OpenGuard
from headrace.runtime.security.identity import ALL_SCOPES, Identity, Scope
from headrace.runtime.security.settings import AuthSettings
from headrace.runtime.security.watched_file import BadFile, WatchedFile

if TYPE_CHECKING:
    from headrace.runtime.security.web_tokens import WebTokenVerifier

log = logging.getLogger(__name__)

REFLECTION = ("/grpc.reflection.v1.ServerReflection/", "/grpc.reflection.v1alpha.ServerReflection/")
CHANNELZ = "/grpc.channelz.v1.Channelz/"
ANONYMOUS_TENANT = "anonymous"


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server offers, and to whom.

    host       on which it listens
    rules      scopes per method of the service; those of reflection and channelz are added
    ordinary   scopes of anonymous callers, where they are allowed although credentials are configured
    role       the identity of a client certificate by its role; None: client certificates are not read
    """

    host: str
    rules: Rules
    ordinary: frozenset[Scope]
    role: RoleOf | None = None


@asynccontextmanager
async def guarding(settings: AuthSettings, served: Served) -> AsyncGenerator[Guard, None]:
    """Yield the guard of a server. Raises BadFile if a file of the settings is not usable."""
    configured = _configured(settings, served)
    open_to_all = _allows_anonymous(settings, served, configured)
    _log_access(configured, served.host, anonymous=open_to_all)
    if open_to_all and not configured:
        yield OpenGuard()
        return
    watched: list[Coroutine[None, None, None]] = []
    callers = web_tokens = None
    if settings.auth_tokens is not None:
        callers = _Callers(settings.auth_tokens)
        with _naming("--auth-tokens", str(settings.auth_tokens)):
            await callers.file.load()
        watched.append(callers.file.watch())
    if settings.auth_jwks:
        with _naming("--auth-jwks", settings.auth_jwks):
            web_tokens, watching = await _web_tokens(settings)
        watched.append(watching)
    guard = AccessGuard(
        {**_standard_rules(settings), **served.rules},
        anonymous=_anonymous(served.ordinary) if open_to_all else None,
        callers=None if callers is None else callers.current,
        web_tokens=web_tokens,
        role=served.role,
    )
    tasks = [asyncio.create_task(each) for each in watched]
    try:
        yield guard
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Callers:
    """The current content of a file of callers."""

    def __init__(self, path: Path) -> None:
        self._now = CallersFile()
        self.file = WatchedFile(path, self._use)

    def current(self) -> CallersFile:
        return self._now

    def _use(self, data: bytes) -> None:
        self._now = parse(data)


async def _web_tokens(settings: AuthSettings) -> tuple[WebTokenVerifier, Coroutine[None, None, None]]:
    """Return the verifier of JWTs, and what keeps its keys up to date. Raises BadFile."""
    try:
        from headrace.runtime.security.jwks import KeySource
        from headrace.runtime.security.web_tokens import WebTokens, WebTokenVerifier
    except ModuleNotFoundError as error:
        if (error.name or "headrace").startswith("headrace"):
            raise
        raise BadFile(f"JWTs need {error.name}; install it by: pip install 'headrace[jwt]'") from None
    keys = KeySource(settings.auth_jwks)
    await keys.load()
    accepted = WebTokens(settings.auth_issuer, settings.auth_audience, settings.auth_tenant_claim)
    return WebTokenVerifier(accepted, keys), keys.watch()


@contextlib.contextmanager
def _naming(flag: str, value: str) -> Generator[None, None, None]:
    """Add the setting to a BadFile."""
    try:
        yield
    except BadFile as error:
        raise BadFile(f"{flag} {value}: {error}") from None


def _configured(settings: AuthSettings, served: Served) -> list[str]:
    kinds = {
        "tokens": settings.auth_tokens is not None,
        "jwts": bool(settings.auth_jwks),
        "certificates": served.role is not None,
    }
    return [kind for kind, given in kinds.items() if given]


def _allows_anonymous(settings: AuthSettings, served: Served, configured: list[str]) -> bool:
    if settings.auth_anonymous == "auto":
        return is_loopback(served.host) and not configured
    return settings.auth_anonymous == "allow"


def _standard_rules(settings: AuthSettings) -> Rules:
    reflection = ALL_SCOPES if settings.auth_reflection == "open" else ADMIN
    return {CHANNELZ: ADMIN, **dict.fromkeys(REFLECTION, reflection)}


def _anonymous(scopes: frozenset[Scope]) -> Identity:
    """Return the identity of anonymous callers beside those with credentials.

    It has a tenant of its own: without credentials, nobody can use the name and the limits of another one.
    """
    return Identity(scopes=scopes, tenant=ANONYMOUS_TENANT, max_priority=DEFAULT_PRIORITY)


def _log_access(configured: list[str], host: str, *, anonymous: bool) -> None:
    """Log what is open, once at the start."""
    facts = {"host": host, "credentials": configured, "anonymous": "allow" if anonymous else "deny"}
    if not anonymous and not configured:
        advice = "set --auth-tokens, --auth-jwks or --tls-ca, or --auth-anonymous allow"
        log.warning(
            "no caller is served: credentials are required and none are configured",
            extra={**facts, "advice": advice},
        )
    elif anonymous and not is_loopback(host):
        served = "everything" if not configured else "requests, as tenant anonymous"
        log.warning("callers without credentials are served", extra={**facts, "open": served})
    else:
        log.info("access", extra=facts)
