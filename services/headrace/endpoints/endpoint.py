"""One address of a server and a client's calls on it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import grpc

from headrace import errors
from headrace.channel import STALE_SECONDS
from headrace.flushing import Flusher
from headrace.multiplex.call import Call
from headrace.multiplex.calling import Caller
from headrace.retries import is_lost_connection
from headrace.v1 import generation_pb2 as pb
from headrace.v1.admin_service_pb2_grpc import AdminServiceStub
from headrace.v1.routing_service_pb2_grpc import RoutingServiceStub
from headrace.v1.tokenizer_service_pb2_grpc import TokenizerServiceStub

# An address is avoided for so long after a call failed there: it may reject calls faster than others answer
# them. The time doubles with each further failure, up to the longest.
AVOID_SECONDS = 1.0
LONGEST_AVOID_SECONDS = 30.0

READY = grpc.ChannelConnectivity.READY
CONNECTED_OR_FAILED = (READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)


class Endpoint:
    """One address and the calls of this client on it.

    in_flight   calls of Generate
    """

    def __init__(self, address: str, channel: grpc.aio.Channel, caller: Caller) -> None:
        self.address = address
        self.channel = channel
        self.caller = caller
        self.routing = RoutingServiceStub(channel)
        self.tokenizer = TokenizerServiceStub(channel)
        self.admin = AdminServiceStub(channel)
        self.in_flight = 0
        self.retired = False
        self._lost_at = self._avoided_until = -math.inf
        self._failures = 0  # consecutive ones

    def fail(self, error: errors.HeadraceError) -> None:
        """Avoid it for a while if *error* is one of the server or its connection."""
        now = time.monotonic()
        if isinstance(error, errors.Unavailable | errors.RequestCancelled | errors.Overloaded):
            if not self.avoided:  # calls that fail together count once
                self._failures = min(self._failures + 1, 10)
            avoided = min(AVOID_SECONDS * 2 ** (self._failures - 1), LONGEST_AVOID_SECONDS)
            self._avoided_until = max(self._avoided_until, now + avoided)
        if is_lost_connection(error):
            self._lost_at = now

    def succeed(self) -> None:
        """Forget earlier failures."""
        if self._failures:
            self._failures = 0
            self._avoided_until = -math.inf

    @property
    def avoided(self) -> bool:
        """Whether a call failed here a moment ago."""
        return time.monotonic() < self._avoided_until

    @property
    def ready(self) -> bool:
        """Whether it is connected. Starts to connect it if it is not.

        A channel is READY for a moment after it lost its connection; see `channel.reconnected`.
        """
        connected = self.channel.get_state(try_to_connect=True) is READY
        return connected and time.monotonic() - self._lost_at >= STALE_SECONDS

    async def connected(self) -> bool:
        """Wait until it is connected; return False if that failed."""
        while (state := self.channel.get_state(try_to_connect=True)) not in CONNECTED_OR_FAILED:
            await self.channel.wait_for_state_change(state)
        return state is READY

    def start(
        self,
        request: pb.GenerateRequest,
        *,
        timeout: float | None,
        metadata: Sequence[tuple[str, str]],
        flusher: Flusher | None,
    ) -> Call:
        """Start a call. The arguments are those of `calling.Caller.call`. Pass it to `Endpoints.end`."""
        self.in_flight += 1
        return self.caller.call(request, timeout=timeout, metadata=metadata, flusher=flusher)

    async def close(self) -> None:
        """Cancel its calls and close the channel."""
        await self.caller.close()
        await self.channel.close()
