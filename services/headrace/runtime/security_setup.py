"""Set up who may call a service, and how it calls others, from its settings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.runtime.security.access import ServiceName, credential_settings
from headrace.runtime.security.caller_guard import Accepted, CallerGuard
from headrace.runtime.security.callers_file import CallersFile, parse
from headrace.runtime.security.guard import Guard, OpenGuard
from headrace.runtime.security.identity import DEFAULT_PRIORITY, Identity, Scope
from headrace.runtime.security.peers import CALLER_SCOPES, Domains, Peers
from headrace.runtime.security.server_tls import ServerTls
from headrace.runtime.security.settings import only_loopback, serves_anonymous
from headrace.runtime.security.watched_file import BadFile, WatchedFile
from headrace.runtime.serving.server import StartFailed
from headrace.runtime.settings import ProcessSettings, ServiceSettings
from headrace.tls.files import BadTls, TlsReader

if TYPE_CHECKING:
    from headrace.runtime.security.jwks import KeySource
    from headrace.runtime.security.web_tokens import WebTokenVerifier

log = logging.getLogger(__name__)

ANONYMOUS_TENANT = "anonymous"
# What callers without credentials may call, where they are allowed although credentials are configured.
_ANONYMOUS_SCOPES: dict[ServiceName, frozenset[Scope]] = {
    "router": CALLER_SCOPES,
    "batcher": frozenset(("router",)),
    "worker": frozenset(("batcher",)),
    "gateway": CALLER_SCOPES,
}


@dataclass(frozen=True)
class Security:
    """The security of one process.

    guard   decides which calls its server accepts
    server  how its server speaks TLS; None: plaintext
    calls   for its calls of other services over TLS; None: plaintext
    """

    guard: Guard = field(default_factory=OpenGuard)
    server: ServerTls | None = None
    calls: TlsReader | None = None


def security(settings: ServiceSettings, service: ServiceName) -> Security:
    """Return the security that the settings ask for, and log what is open. Raises StartFailed."""
    files = settings.tls_files
    if files is None:
        return Security(guard=guard(settings, service))
    try:
        reader = TlsReader(files)
    except BadTls as error:
        raise StartFailed(f"TLS: {error}") from error
    if files.ca is None:
        server = ServerTls(reader, ask_certificates=False)
        return Security(guard=guard(settings, service), server=server)
    listed = Domains.parse(settings.tls_peers.split(",")) if settings.tls_peers.strip() else None
    peers = Peers(reader, listed)
    peers.domains()  # logs the certificate, and warns if nobody has a role
    return Security(
        guard=guard(settings, service, peers),
        server=ServerTls(reader, ask_certificates=settings.tls_client_certificates == "required"),
        calls=reader,
    )


def guard(settings: ProcessSettings, service: ServiceName, peers: Peers | None = None) -> Guard:
    """Return the guard of a server, and log what is open. Raises StartFailed.

    peers   the identities of client certificates; None: the server does not ask for them
    """
    kinds = {
        "tokens": settings.auth_tokens is not None,
        "jwts": bool(settings.auth_jwks),
        "certificates": peers is not None,
    }
    configured = [kind for kind, given in kinds.items() if given]
    anonymous = serves_anonymous(settings, settings.host, configured=bool(configured))
    _log_access(settings.host, service, configured, anonymous=anonymous)
    if anonymous and not configured:
        return OpenGuard()
    maintained: list[Callable[[], Coroutine[Any, Any, None]]] = []
    callers = web_tokens = None
    if settings.auth_tokens is not None:
        with _starting(f"--auth-tokens {settings.auth_tokens}"):
            callers = _Callers(settings.auth_tokens)
        maintained.append(callers.file.watch)
    if settings.auth_jwks:
        with _starting(f"--auth-jwks {settings.auth_jwks}"):
            web_tokens, keys = _web_tokens(settings)
        maintained.append(keys.watch)
    return CallerGuard(
        service,
        Accepted(
            anonymous=_anonymous(service) if anonymous else None,
            callers=None if callers is None else callers.current,
            web_tokens=web_tokens,
            peers=peers,
        ),
        reflection_open=settings.auth_reflection == "open",
        maintained=tuple(maintained),
    )


class _Callers:
    """The current content of a file of callers. Raises BadFile if it is not usable at the start."""

    def __init__(self, path: Path) -> None:
        self._now = CallersFile()
        self.file = WatchedFile(path, self._use)
        self.file.load()

    def current(self) -> CallersFile:
        return self._now

    def _use(self, data: bytes) -> None:
        self._now = parse(data)


def _web_tokens(settings: ProcessSettings) -> tuple[WebTokenVerifier, KeySource]:
    """Return the verifier of JWTs and the keys that it uses. Raises BadFile."""
    try:
        from headrace.runtime.security.jwks import KeySource
        from headrace.runtime.security.web_tokens import WebTokens, WebTokenVerifier
    except ModuleNotFoundError as error:
        if (error.name or "headrace").startswith("headrace"):
            raise
        raise BadFile(f"JWTs need {error.name}; install it by: pip install 'headrace[jwt]'") from None
    keys = KeySource(settings.auth_jwks)
    keys.load()
    accepted = WebTokens(settings.auth_issuer, settings.auth_audience, settings.auth_tenant_claim)
    return WebTokenVerifier(accepted, keys), keys


@contextmanager
def _starting(setting: str) -> Generator[None, None, None]:
    try:
        yield
    except BadFile as error:
        raise StartFailed(f"{setting}: {error}") from error


def _anonymous(service: ServiceName) -> Identity:
    """Return the identity of callers without credentials, where others have some.

    It has a tenant of its own: without credentials, nobody can use the name and the limits of another one.
    """
    tenant = ANONYMOUS_TENANT if service in ("router", "gateway") else None
    return Identity(
        name="anonymous", scopes=_ANONYMOUS_SCOPES[service], tenant=tenant, max_priority=DEFAULT_PRIORITY
    )


def _log_access(host: str, service: ServiceName, configured: list[str], *, anonymous: bool) -> None:
    """Log what is open to callers without credentials, once at the start."""
    open_to_all = "health checks"
    if anonymous:
        open_to_all = "requests, as the tenant anonymous" if configured else "everything"
    facts = {
        "host": host,
        "credentials": configured,
        "anonymous": "allow" if anonymous else "deny",
        "open": open_to_all,
    }
    if not anonymous and not configured:
        facts["advice"] = f"set {credential_settings(service)}, or --auth-anonymous allow"
        log.warning("no caller is served: credentials are required, and none are configured", extra=facts)
    elif anonymous and not only_loopback(host):
        log.warning("callers without credentials are served", extra=facts)
    else:
        log.info("access to the server", extra=facts)
