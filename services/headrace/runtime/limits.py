"""What a server holds for its callers at most: bytes, calls, connections, streams and headers.

The numbers here and the memory limits of `k8s/base` belong together; tests/test_deployment.py compares them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

log = logging.getLogger(__name__)

MIB = 1024 * 1024

# Calls that were not accepted yet. Beyond that core ends calls of all connections as CANCELLED; its default
# of 1,000 to 3,000 is one connection's burst. A call that waits takes 7 kB.
PENDING_CALLS = 8192
HEADERS_SOFT_BYTES = 8 * 1024
HEADERS_HARD_BYTES = 16 * 1024
HANDSHAKE_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server holds at most.

    message_bytes   of one request message
    held_bytes      of all requests in hand; see `budget`
    streams         that one connection may have open; a gRPC client waits with what is more
    calls           in hand; see `budget`
    connections     at the same time; further ones are closed when they come. Not counted by peer: core does
                    not report connections
    """

    message_bytes: int = 2 * MIB
    held_bytes: int = 32 * MIB
    streams: int = 2048
    calls: int = 2048
    connections: int = 4096

    def options(self) -> tuple[tuple[str, int], ...]:
        """The limits as options of a gRPC server; names and meanings in grpc/impl/channel_arg_names.h."""
        return (
            ("grpc.max_receive_message_length", self.message_bytes),
            # Core inflates a message before anything of ours can count it: a caller that compresses is
            # answered UNIMPLEMENTED before its message is read. 1 is the bit of "identity".
            ("grpc.compression_enabled_algorithms_bitset", 1),
            ("grpc.max_metadata_size", HEADERS_SOFT_BYTES),
            ("grpc.absolute_max_metadata_size", HEADERS_HARD_BYTES),
            ("grpc.max_concurrent_streams", self.streams),
            ("grpc.server.max_pending_requests", PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS),
            # Of a stream that nobody reads yet core keeps 64 KiB; probing would raise that to megabytes.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
            ("grpc.max_allowed_incoming_connections", self.connections),
        )


def raise_file_limit() -> None:
    """Allow this process as many open files as its user may have: each connection takes one."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # as on macOS, where the hard limit may be more than the system's
        log.warning("the limit of open files stays", extra={"soft": soft, "hard": hard, "reason": str(error)})
