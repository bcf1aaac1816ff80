"""Define the seam between a server and the rules by which calls are allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from headrace.runtime.security.identity import ANONYMOUS, Identity

Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection.

    address        as gRPC names it, such as "ipv4:10.0.0.7:41234"
    certificate    properties of its verified certificate, as in ServicerContext.auth_context(); empty if it
                   has none
    """

    address: str
    certificate: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)


class Guard(Protocol):
    """Decides which calls a server accepts."""

    async def identify(self, method: str, metadata: Metadata, peer: Peer) -> Identity:
        """Return who calls *method*, such as "/headrace.v1.GenerationService/Generate".

        Raises CredentialsRequired, CredentialsInvalid or Forbidden. Called before the message of the call is
        read, so it must be fast and must not trust anything but the arguments.
        """

    async def maintain(self) -> None:
        """Keep what the guard reads up to date. The server runs it, and cancels it at its end."""


class OpenGuard:
    """Accepts every call, anonymously."""

    async def identify(self, method: str, metadata: Metadata, peer: Peer) -> Identity:
        """Return the anonymous identity, which may call everything."""
        return ANONYMOUS

    async def maintain(self) -> None:
        """Return: there is nothing to keep up to date."""
