"""Serve WorkerService: one `Run` stream per batcher, and the model's description."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from headrace import errors
from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.worker_service_pb2_grpc import WorkerServiceServicer
from headrace.worker.flow.allowance import Allowance
from headrace.worker.stream import BatcherStream
from headrace.worker.streams import BatcherStreams

log = logging.getLogger(__name__)

SERVICES = tuple(wire.DESCRIPTOR.services_by_name.values())
RUN = "/headrace.v1.WorkerService/Run"
LOAD_SECONDS = 1.0  # between two load reports
HELLO_SECONDS = 10.0  # for the first message of a stream to arrive
MAX_CANCEL = 65_536  # handles in one message

_Context = grpc.aio.ServicerContext[Any, Any]


class WorkerServicer(WorkerServiceServicer):
    """Serves batchers. Rejects them until `open` is called, because the model loads while the server runs."""

    def __init__(self, worker_id: str, incarnation: int) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._streams: BatcherStreams | None = None
        self._calls = 0  # of Run, until gRPC has finished them

    def open(self, streams: BatcherStreams) -> None:
        """Accept batchers: the model is loaded and warm."""
        self._streams = streams

    @property
    def streams(self) -> BatcherStreams | None:
        """The batchers' streams; None while the model loads."""
        return self._streams

    @property
    def ready(self) -> bool:
        """Whether batchers are accepted."""
        return self._streams is not None

    async def drain(self, seconds: float) -> None:
        """Stop admitting, let sequences finish within *seconds*, hand off the rest, and end the streams."""
        streams = self._streams
        if streams is None:
            return
        streams.stop_admitting()
        notice = wire.Drain()
        notice.deadline.FromNanoseconds(int(seconds * 1e9))
        streams.broadcast(wire.RunResponse(drain=notice))
        ends = time.monotonic() + seconds
        while streams.in_flight and time.monotonic() < ends:
            await asyncio.sleep(0.02)
        if streams.in_flight:
            log.warning("handing off", extra={"sequences": streams.in_flight})
            streams.hand_off()
            while streams.in_flight:
                await asyncio.sleep(0.02)
        while streams.unsent:
            await asyncio.sleep(0.02)

    async def GetModel(self, request: wire.GetModelRequest, context: _Context) -> wire.GetModelResponse:
        """Describe the model."""
        return wire.GetModelResponse(model=described(self._loaded()))

    async def Run(  # type: ignore[override] # the stub allows generators only; a coroutine may write as well
        self, requests: AsyncIterator[wire.RunRequest], context: _Context
    ) -> None:
        """Serve one batcher until it hangs up."""
        streams = self._loaded()
        if self._calls >= 2 * streams.max_streams:
            raise errors.Overloaded(f"too many streams are open or opening: {self._calls}", retry_after=1.0)
        self._calls += 1
        context.add_done_callback(cast(Any, self._call_done))
        hello = await _hello(requests)
        stream = streams.open(hello)
        names = {"batcher": stream.batcher_id, "epoch": stream.epoch}
        log.info("batcher connected", extra=names)
        stream.send_first(self._welcome(streams, stream))
        try:
            # A task that fails ends the others, and the stream with its error as the status.
            async with asyncio.TaskGroup() as tasks:
                writing = tasks.create_task(_write(context, stream))
                others = [tasks.create_task(_send_load(streams, stream)), tasks.create_task(_failure(stream))]
                await _read(requests, streams, stream)
                stream.half_close()
                await writing
                for task in others:
                    task.cancel()
        finally:
            streams.close(stream)
            log.info("batcher disconnected", extra=names)

    def _welcome(self, streams: BatcherStreams, stream: BatcherStream) -> wire.RunResponse:
        return wire.RunResponse(
            welcome=wire.Welcome(
                worker_id=self._worker_id,
                incarnation=self._incarnation,
                epoch=stream.epoch,
                model=described(streams),
                credit=wire.Credit(generation=stream.generation, sequences=stream.credit),
            )
        )

    def _call_done(self, context: _Context) -> None:
        self._calls -= 1

    def _loaded(self) -> BatcherStreams:
        if self._streams is None:
            raise errors.NotReady("the model is still loading; try again", retry_after=1.0)
        return self._streams


async def _hello(requests: AsyncIterator[wire.RunRequest]) -> wire.Hello:
    """Read the first message, within HELLO_SECONDS."""
    try:
        async with asyncio.timeout(HELLO_SECONDS):
            first = await anext(aiter(requests), None)
    except TimeoutError:
        raise errors.InvalidRequest(f"no hello within {HELLO_SECONDS:g} s", field="hello") from None
    except DecodeError as error:
        raise errors.InvalidText(f"the first message of Run cannot be parsed ({error})") from None
    if first is None or first.WhichOneof("message") != "hello":
        raise errors.InvalidRequest("the first message of Run must be hello", field="hello")
    return first.hello


async def _read(
    requests: AsyncIterator[wire.RunRequest], streams: BatcherStreams, stream: BatcherStream
) -> None:
    """Handle the batcher's messages, at the allowed rate, until it half-closes."""
    allowance = Allowance(time.monotonic())
    try:
        async for request in requests:
            _handle(streams, stream, request)
            if wait := allowance.wait(request.WhichOneof("message"), time.monotonic()):
                await asyncio.sleep(wait)
    except DecodeError as error:
        raise errors.InvalidText(f"a message of the stream cannot be parsed ({error})") from None


def _handle(streams: BatcherStreams, stream: BatcherStream, request: wire.RunRequest) -> None:
    if stream.error is not None:
        return  # about to end
    stream.last_received = time.monotonic()
    kind = request.WhichOneof("message")
    if kind == "submit":
        stream.send(streams.submit(stream, request.submit))
    elif kind == "cancel":
        if len(request.cancel.handles) > MAX_CANCEL:
            raise errors.InvalidRequest(
                f"cancel has {len(request.cancel.handles)} handles; at most {MAX_CANCEL} are allowed",
                field="cancel.handles",
            )
        streams.cancel(stream, request.cancel.handles)
    elif kind == "ack":
        streams.acknowledge(stream, request.ack)
    elif kind == "ping":
        stream.send(wire.RunResponse(pong=wire.Pong(nonce=request.ping.nonce)))
    elif kind == "quiesce":
        stream.done = True
    elif kind == "hello":
        raise errors.InvalidRequest("hello must be sent only once, first", field="hello")
    # Members of later versions are ignored.


async def _write(context: _Context, stream: BatcherStream) -> None:
    """Send messages until the batcher has half-closed and all of them are sent."""
    while not stream.complete:
        await stream.has_unsent.wait()
        stream.sending = True
        for response in stream.take_messages(time.monotonic()):
            try:
                await context.write(response)
            except grpc.aio.BaseError as error:
                raise errors.RequestCancelled("the batcher has disconnected") from error
        stream.sending = False


async def _send_load(streams: BatcherStreams, stream: BatcherStream) -> None:
    """Send the load regularly."""
    while True:
        stream.send(wire.RunResponse(load=streams.load()))
        streams.share_credit()  # a stream stops being backlogged by time alone
        await asyncio.sleep(LOAD_SECONDS)


async def _failure(stream: BatcherStream) -> None:
    """Wait until the stream must end, and raise its error."""
    await stream.failed.wait()
    assert stream.error is not None, "a failed stream has an error"
    raise stream.error


def described(streams: BatcherStreams) -> wire.ModelDescription:
    """Return the model's description, as batchers receive it."""
    model = streams.model
    return wire.ModelDescription(
        name=model.name,
        revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        weights_fingerprint=model.weights_fingerprint,
        context_length=model.context_length,
        vocabulary_size=model.vocabulary_size,
        max_running=model.max_running,
        kv_tokens=model.kv_tokens,
        determinism=wire.DETERMINISM_EXACT if model.exact else wire.DETERMINISM_BEST_EFFORT,
        features=model.features,
        shared_block_tokens=streams.shared_block_tokens,
        step_tokens=streams.step_tokens,
    )
