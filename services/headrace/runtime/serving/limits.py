"""Define what a server accepts from its callers at most: bytes, calls, connections, streams and headers.

The memory limits in `k8s/base` follow from these numbers; tests/deploy/test_settings.py compares them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

log = logging.getLogger(__name__)

MIB = 1024 * 1024

# Calls that are not accepted yet. Core ends calls of all connections as CANCELLED beyond this number, and its
# default, 1,000 to 3,000, is what one connection can send at once. A pending call takes 7 kB.
PENDING_CALLS = 8192
HEADERS_SOFT_BYTES = 8 * 1024
HEADERS_HARD_BYTES = 16 * 1024
HANDSHAKE_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one server.

    max_message_bytes       of one request message
    max_inflight_bytes      of all requests in flight; see `inflight`
    max_concurrent_streams  open calls of one connection; a gRPC client queues further ones
    max_calls               calls in flight; see `inflight`
    max_connections         open connections; further ones are closed immediately. Not limited per peer: core
                            does not report connections
    """

    max_message_bytes: int = 2 * MIB
    max_inflight_bytes: int = 32 * MIB
    max_concurrent_streams: int = 2048
    max_calls: int = 4096
    max_connections: int = 4096

    def options(self) -> tuple[tuple[str, int], ...]:
        """Return the limits as options of a gRPC server; see grpc/impl/channel_arg_names.h."""
        return (
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # Core decompresses a message before any code here can count it, so compressed calls end as
            # UNIMPLEMENTED before their message is read. 1 is the bit of "identity".
            ("grpc.compression_enabled_algorithms_bitset", 1),
            ("grpc.max_metadata_size", HEADERS_SOFT_BYTES),
            ("grpc.absolute_max_metadata_size", HEADERS_HARD_BYTES),
            ("grpc.max_concurrent_streams", self.max_concurrent_streams),
            ("grpc.server.max_pending_requests", PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS),
            # Core buffers 64 KiB of an unread stream; bandwidth probing would raise that to megabytes.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
        )


def raise_file_limit() -> None:
    """Raise this process's limit of open files to its hard limit: each connection takes a file."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # on macOS the hard limit may exceed what the system allows
        log.warning("open file limit not raised", extra={"soft": soft, "hard": hard, "reason": str(error)})
