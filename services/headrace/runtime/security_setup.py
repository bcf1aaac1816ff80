"""Set up who may call a service, and how it calls others, from its settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.runtime.security.access import ServiceName
from headrace.runtime.security.guard import Guard, OpenGuard
from headrace.runtime.security.peers import Domains, PeerGuard, Peers
from headrace.runtime.security.server_tls import ServerTls
from headrace.runtime.serving.server import StartFailed
from headrace.runtime.settings import ServiceSettings
from headrace.tls.files import BadTls, TlsReader


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
    """Return the security that the settings ask for. Raises StartFailed."""
    files = settings.tls_files
    if files is None:
        return Security()
    try:
        reader = TlsReader(files)
    except BadTls as error:
        raise StartFailed(f"TLS: {error}") from error
    if files.ca is None:
        return Security(server=ServerTls(reader, ask_certificates=False))
    listed = Domains.parse(settings.tls_peers.split(",")) if settings.tls_peers.strip() else None
    peers = Peers(reader, listed)
    peers.domains()  # logs the certificate, and warns if nobody has a role
    return Security(
        guard=PeerGuard(service, peers),
        server=ServerTls(reader, ask_certificates=settings.tls_client_certificates == "required"),
        calls=reader,
    )
