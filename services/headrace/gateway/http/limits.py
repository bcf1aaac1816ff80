"""Define what the HTTP server accepts from its clients at most: bytes, connections and time."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.runtime.serving.limits import MIB, Limits

MAX_HEADERS = 100
MAX_PIPELINED = 32  # requests that wait for the one before them on the same connection
TLS_HANDSHAKE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """The limits of one HTTP server.

    max_body_bytes      of one request
    max_inflight_bytes  of the bodies of all requests in flight; see `runtime.serving.inflight`
    max_calls           requests in flight; with the same shares for a host
    max_connections     open connections; further ones get a 503 and are closed
    max_header_bytes    of the request line and the headers of one request
    header_seconds      for the request line and the headers, from the first byte or from the connection
    body_seconds        for the body, from the headers
    idle_seconds        for which a connection without a request is kept open
    unread_seconds      for which a client may leave a full buffer unread
    ping_seconds        after which a comment is sent in a stream without events
    """

    max_body_bytes: int = 4 * MIB
    max_inflight_bytes: int = 32 * MIB
    max_calls: int = 2048
    max_connections: int = 4096
    max_header_bytes: int = 32 * 1024
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    unread_seconds: float = 60.0
    ping_seconds: float = 15.0

    @property
    def inflight(self) -> Limits:
        """The limits of calls and bytes in flight."""
        return Limits(
            max_message_bytes=self.max_body_bytes,
            max_inflight_bytes=self.max_inflight_bytes,
            max_calls=self.max_calls,
            max_connections=self.max_connections,
        )
