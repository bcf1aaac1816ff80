"""Find the role of a peer in the names of its certificate, and what it permits.

A role is the last segment of a SPIFFE URI, as in `spiffe://cluster.local/ns/headrace/sa/batcher-small`, or
the first label of a DNS name, as in `batcher-small.headrace.svc`. What surrounds it, the domain, must be the
same as in the certificate of this process, or be one of `--tls-peers`: an authority that many teams share
signs certificates for other teams' routers as well.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias

from headrace.runtime.security.guard import Peer
from headrace.runtime.security.identity import ALL_SCOPES, DEFAULT_PRIORITY, Identity, Scope, is_name
from headrace.tls.files import Material, TlsReader

log = logging.getLogger(__name__)

Role: TypeAlias = Literal["router", "batcher", "worker", "gateway", "admin"]

# What a peer may call. A router calls batchers, and as a tier of another router that router. A gateway calls
# routers, for any tenant: it knows whose request it passes on.
SCOPES: Mapping[Role, frozenset[Scope]] = {
    "router": frozenset(("router", "generate")),
    "batcher": frozenset(("batcher",)),
    "worker": frozenset(),
    "gateway": frozenset(("generate", "feedback")),
    "admin": ALL_SCOPES,
}
# Other certificates that are verified, and callers without one, may call what callers of a router need.
CALLER_SCOPES: frozenset[Scope] = frozenset(("generate", "feedback"))

# `batcher-small` is a batcher, but `admin-dashboard` is not an administrator.
_ROLE = re.compile(r"(?:headrace-)?(?:(?P<role>router|batcher|worker|gateway)(?:-.+)?|(?P<admin>admin))")


@dataclass(frozen=True)
class Domains:
    """What surrounds the role in the names of this mesh's certificates.

    uris      what precedes it, such as "spiffe://cluster.local/ns/headrace/sa/"
    suffixes  what follows it, such as ".headrace.svc"; not used if there are *uris*
    """

    uris: frozenset[str] = frozenset()
    suffixes: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, entries: Iterable[str]) -> Domains:
        """Read `--tls-peers`. Raises ValueError."""
        uris, suffixes = set(), set()
        for entry in filter(None, (entry.strip() for entry in entries)):
            if entry.startswith("spiffe://") and entry.count("/") > 2 and entry.endswith("/"):
                uris.add(entry)
            elif re.fullmatch(r"(\.[a-zA-Z0-9-]+)+", entry):
                suffixes.add(entry.lower())
            else:
                raise ValueError(
                    f"{entry!r} is neither the start of a SPIFFE URI, such as "
                    "spiffe://cluster.local/ns/headrace/sa/, nor the end of a DNS name, such as .headrace.svc"
                )
        return cls(frozenset(uris), frozenset(suffixes))

    @classmethod
    def around(cls, uris: Iterable[str], names: Iterable[str]) -> Domains:
        """Return the domains of those names of a certificate that contain a role."""
        return cls(
            frozenset(before for before, role in map(_split_uri, uris) if role),
            frozenset(after for role, after in map(_split_name, names) if role),
        )

    def role(self, uris: Iterable[str], names: Iterable[str]) -> Role | None:
        """Return the role of a peer whose certificate has these names; None if it has none here."""
        if self.uris:
            return next(
                (role for before, role in map(_split_uri, uris) if role and before in self.uris), None
            )
        return next(
            (role for role, after in map(_split_name, names) if role and after in self.suffixes), None
        )


def _split_uri(uri: str) -> tuple[str, Role | None]:
    if not uri.startswith("spiffe://"):
        return "", None
    before, slash, last = uri.rpartition("/")
    return before + slash, role_in(last) if before.count("/") > 1 else None


def _split_name(name: str) -> tuple[Role | None, str]:
    first, dot, rest = name.lower().partition(".")
    return role_in(first) if rest else None, dot + rest


def role_in(text: str) -> Role | None:
    """Return the role that a segment or a label names, such as worker-small."""
    match = _ROLE.fullmatch(text)
    if match is None:
        return None
    return "admin" if match["admin"] else match["role"]  # type: ignore[return-value] # the pattern's words


def names_of(certificate: Mapping[str, tuple[bytes, ...]]) -> tuple[list[str], list[str]]:
    """Return URIs and DNS names of a peer's verified certificate; both empty if it has none."""
    return (
        [uri.decode(errors="replace") for uri in certificate.get("peer_uri", ())],
        [name.decode(errors="replace") for name in certificate.get("peer_dns", ())],
    )


def has_certificate(peer: Peer) -> bool:
    """Return whether the peer has shown a certificate, which gRPC has verified."""
    return "x509_pem_cert" in peer.certificate


@dataclass(frozen=True)
class OwnCertificate:
    """What a process needs to know of its own certificate: its names, and when it expires."""

    uris: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    expires: datetime | None = None

    @classmethod
    def read(cls, certificate: bytes) -> OwnCertificate:
        """Read a certificate in PEM format."""
        # Imported here: it takes 10 MB, which processes without TLS do not need.
        from cryptography import x509

        try:
            read = x509.load_pem_x509_certificate(certificate)
            found = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, x509.ExtensionNotFound):
            return cls()
        return cls(
            tuple(found.get_values_for_type(x509.UniformResourceIdentifier)),
            tuple(found.get_values_for_type(x509.DNSName)),
            read.not_valid_after_utc,
        )


class Peers:
    """The identities of peers by their certificates.

    reader   reads the certificate of this process, whose domains are trusted
    listed   domains that are trusted instead
    """

    def __init__(self, reader: TlsReader, listed: Domains | None = None) -> None:
        self._reader = reader
        self._listed = listed
        self._material: Material | None = None
        self._domains = Domains()

    def identity(self, peer: Peer) -> Identity | None:
        """Return the identity of a peer; None if it has no certificate.

        A certificate without a role is that of a caller: it may call routers, as a tenant of its own name.
        """
        if not has_certificate(peer):
            return None
        uris, names = names_of(peer.certificate)
        role = self.domains().role(uris, names)
        # What else a certificate may contain is not fit for logs, nor as a tenant.
        name = next(filter(is_name, (*uris, *names, *_common_names(peer))), "a certificate without a name")
        if role is None:
            return Identity(name=name, scopes=CALLER_SCOPES, tenant=name, max_priority=DEFAULT_PRIORITY)
        return Identity(name=name, scopes=SCOPES[role])

    def domains(self) -> Domains:
        """Return the trusted domains."""
        material = self._reader.current()
        if material is not self._material:
            self._material = material
            own = OwnCertificate.read(material.cert or b"")
            self._domains = self._listed or Domains.around(own.uris, own.names)
            log.info(
                "certificate in use",
                extra={
                    "names": [*own.uris, *own.names],
                    "expires": own.expires.isoformat() if own.expires else "",
                    "peers": [*sorted(self._domains.uris), *sorted(self._domains.suffixes)],
                },
            )
            if self._domains == Domains():
                log.warning(
                    "no peer has a role: no name of this certificate contains one, and --tls-peers is not set"
                )
        return self._domains


def _common_names(peer: Peer) -> list[str]:
    found = (name.decode(errors="replace") for name in peer.certificate.get("x509_common_name", ()))
    return [name for name in found if name]
