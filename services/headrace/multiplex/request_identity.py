"""Identify each request of a shared stream: it outlives tokens, and may carry requests of many callers."""

from __future__ import annotations

from typing import Any

from headrace.bearer import AUTHORIZATION
from headrace.runtime.security.guard import Guard, Metadata, Peer
from headrace.runtime.security.identity import Identity

_GENERATE = "/headrace.v1.GenerationService/Generate"


class RequestIdentities:
    """The identities behind the requests of one stream."""

    def __init__(self, guard: Guard, context: Any) -> None:
        self._guard = guard
        self._peer = Peer(context.peer(), context.auth_context())
        self._credentials = _credentials(context.invocation_metadata() or ())

    async def of(self, metadata: Metadata) -> Identity:
        """Return who sends a request: the owner of the token in its *metadata*, or else of the stream's.

        Raises the errors of `Guard.identify`.
        """
        return await self._guard.identify(_GENERATE, _credentials(metadata) or self._credentials, self._peer)


def _credentials(metadata: Metadata) -> list[tuple[str, str | bytes]]:
    # Unlike gRPC's metadata, a map does not lower its keys. Credentials in another spelling would be ignored,
    # and the request would be one of the stream's owner.
    return [(AUTHORIZATION, value) for key, value in metadata if key.lower() == AUTHORIZATION]
