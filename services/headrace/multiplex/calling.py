"""Make calls of Generate on one channel: each call an RPC of its own, or all of them on one shared stream.

`Caller` chooses. A call on the shared stream behaves as one of its own: the same events, the same errors, its
own deadline, cancellation and flow control. `shared_stream` implements the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import grpc

from headrace import errors, statuses
from headrace.bearer import Authorization, Headers, authorized, no_authorization
from headrace.flushing import Flusher
from headrace.multiplex.call import Call, Take
from headrace.multiplex.limits import LARGE_BYTES
from headrace.multiplex.shared_call import SharedCall
from headrace.multiplex.shared_stream import SharedStream
from headrace.v1 import generation_pb2 as pb
from headrace.v1.generation_service_pb2_grpc import GenerationServiceStub

# A caller that makes more calls than this at a time opens the shared stream, unless it was told which to use.
FEW_CALLS = 4
# It then uses the stream for all calls, until there were none for so long.
IDLE_SECONDS = 60.0
STALL_SECONDS = 30.0
NOT_HEADRACE = "the server's response cannot be parsed: it is not a Headrace server"
# A server that does not offer the stream may be replaced by a newer one.
OFFERED_AGAIN_SECONDS = 60.0


class Caller:
    """Makes the calls of one channel.

    multiplex       whether calls use the shared stream; None: from the time when more than `FEW_CALLS` are in
                    flight, until there were none for `IDLE_SECONDS`
    stall_seconds   a shared stream is lost if it is silent for so long while calls wait
    caller_id       identifies this caller in the server's logs
    authorization   returns the headers that prove who calls
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        multiplex: bool | None = None,
        stall_seconds: float = STALL_SECONDS,
        caller_id: str = "",
        authorization: Authorization = no_authorization,
    ) -> None:
        self._authorization = authorization
        self._sent_authorization: Headers = ()  # when the shared stream was opened
        self._stub = GenerationServiceStub(channel)
        self._multiplex = multiplex
        self._stall_seconds = stall_seconds
        self._caller_id = caller_id
        self._stream: SharedStream | None = None
        self._streams: set[SharedStream] = set()  # with those that drain
        self._epoch = 0
        self._not_offered_until = 0.0
        self._calls: set[Call] = set()

    def call(
        self,
        request: pb.GenerateRequest,
        *,
        timeout: float | None,
        metadata: Sequence[tuple[str, str]],
        flusher: Flusher | None = None,
    ) -> Call:
        """Start a call. Pass it to `ended` afterwards.

        timeout   seconds for the whole answer; None for no deadline
        flusher   when tokens that were gathered on the shared stream are handed over; None: each at once
        """
        if (
            self._shares()
            and time.monotonic() >= self._not_offered_until
            and request.ByteSize() <= LARGE_BYTES
        ):
            stream, authorization = self._shared_stream(), self._authorization()
            if authorization != self._sent_authorization:  # the token was replaced since
                metadata = authorized(metadata, authorization)
            call: Call = stream.open(request, timeout=timeout, metadata=metadata, flusher=flusher)
        else:
            call = self._own_call(request, timeout, metadata)
        self._calls.add(call)
        return call

    def ended(self, call: Call) -> None:
        """Cancel the call unless it has ended, and forget it."""
        self._calls.discard(call)
        call.cancel()

    def fail_all(self, error: Exception) -> None:
        """End all calls in flight with *error*."""
        for call in self._calls:
            call.fail(error)

    async def close(self) -> None:
        """End the shared stream, and all calls on it as cancelled."""
        for stream in list(self._streams):
            await stream.close()

    def _shares(self) -> bool:
        if self._multiplex is not None:
            return self._multiplex
        return self._open is not None or len(self._calls) >= FEW_CALLS

    @property
    def _open(self) -> SharedStream | None:
        """The stream that accepts calls, if any."""
        return self._stream if self._stream is not None and self._stream.accepts_calls else None

    def _shared_stream(self) -> SharedStream:
        stream = self._open
        if stream is None:
            self._epoch += 1
            self._sent_authorization = self._authorization()
            stream = self._stream = SharedStream(
                self._stub.Multiplex(metadata=self._sent_authorization or None),
                epoch=self._epoch,
                caller_id=self._caller_id,
                stall_seconds=self._stall_seconds,
                idle_seconds=IDLE_SECONDS if self._multiplex is None else None,
                instead=self._instead,
                on_end=self._streams.discard,
            )
            self._streams.add(stream)
        return stream

    def _instead(self, call: SharedCall) -> Call:
        """Make a call of its own in place of one on the stream, which the server does not offer."""
        self._not_offered_until = time.monotonic() + OFFERED_AGAIN_SECONDS
        return self._own_call(call.request, call.seconds_left, call.metadata)

    def _own_call(
        self, request: pb.GenerateRequest, timeout: float | None, metadata: Sequence[tuple[str, str]]
    ) -> Call:
        metadata = authorized(metadata, self._authorization())
        return _OwnCall(self._stub.Generate(request, timeout=timeout, metadata=metadata))


class _OwnCall:
    """A call that is an RPC of its own."""

    def __init__(self, call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> None:
        self._call = call
        self._failure: Exception | None = None

    async def next(self) -> pb.GenerateResponse | None:
        """See `call.Call`."""
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise statuses.from_rpc_error(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._failure is None or (task is not None and task.cancelling()):
                raise
            raise self._failure from None
        if response is None:
            raise errors.Unavailable(NOT_HEADRACE)
        return response if isinstance(response, pb.GenerateResponse) else None  # the end of the stream

    def offer(self, take: Take) -> None:
        """See `call.Call`. It offers none: each is a message, which `next` waits for."""

    def cancel(self) -> None:
        """See `call.Call`."""
        self._call.cancel()

    def fail(self, error: Exception) -> None:
        """See `call.Call`."""
        self._failure = error
        self._call.cancel()
