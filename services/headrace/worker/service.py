"""Speak WorkerService: one `Run` stream per batcher, and the model's description."""

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
from headrace.worker.allowance import Allowance
from headrace.worker.stream import Session
from headrace.worker.streams import Sessions

log = logging.getLogger(__name__)

SERVICES = tuple(wire.DESCRIPTOR.services_by_name.values())
RUN = "/headrace.v1.WorkerService/Run"
LOAD_SECONDS = 1.0
HELLO_SECONDS = 10.0  # between the beginning of a stream and its first message
MAX_CANCEL = 65_536  # handles in one message

_Context = grpc.aio.ServicerContext[Any, Any]


class WorkerServicer(WorkerServiceServicer):
    """Answers batchers; refuses them until `open` was called, for the model loads while we serve."""

    def __init__(self, worker_id: str, incarnation: int) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._sessions: Sessions | None = None
        self._calls = 0  # of Run, until gRPC is done with them

    def open(self, sessions: Sessions) -> None:
        """The model is loaded and warm."""
        self._sessions = sessions

    @property
    def sessions(self) -> Sessions | None:
        """The batchers' streams; None while the model loads."""
        return self._sessions

    @property
    def ready(self) -> bool:
        """Whether batchers may come."""
        return self._sessions is not None

    async def drain(self, seconds: float) -> None:
        """Take no more; let what runs finish within *seconds*, hand back the rest, end the streams."""
        sessions = self._sessions
        if sessions is None:
            return
        sessions.stop_admitting()
        notice = wire.Drain()
        notice.deadline.FromNanoseconds(int(seconds * 1e9))
        sessions.announce(wire.RunResponse(drain=notice))
        ends = time.monotonic() + seconds
        while sessions.live and time.monotonic() < ends:
            await asyncio.sleep(0.02)
        if sessions.live:
            log.warning("handing back", extra={"sequences": sessions.live})
            sessions.hand_back()
            while sessions.live:
                await asyncio.sleep(0.02)
        while sessions.unsent:
            await asyncio.sleep(0.02)

    async def GetModel(self, request: wire.GetModelRequest, context: _Context) -> wire.GetModelResponse:
        """Describe the model."""
        return wire.GetModelResponse(model=described(self._open_sessions()))

    async def Run(  # type: ignore[override] # the stub knows generators only; a coroutine may write, too
        self, requests: AsyncIterator[wire.RunRequest], context: _Context
    ) -> None:
        """Carry one batcher's work until it hangs up."""
        sessions = self._open_sessions()
        if self._calls >= 2 * sessions.max_streams:
            raise errors.Overloaded(
                f"{self._calls} streams are open or about to be, which is too many", retry_after=1.0
            )
        self._calls += 1
        context.add_done_callback(cast(Any, self._call_done))
        hello = await _hello(requests)
        session = sessions.open(hello)
        names = {"batcher": session.batcher_id, "epoch": session.epoch}
        log.info("batcher connected", extra=names)
        session.welcome(
            wire.RunResponse(
                welcome=wire.Welcome(
                    worker_id=self._worker_id,
                    incarnation=self._incarnation,
                    epoch=hello.epoch,
                    model=described(sessions),
                    credit=wire.Credit(generation=session.generation, sequences=session.credit),
                )
            )
        )
        try:
            # A task that fails ends the others, and the stream with its error as the status.
            async with asyncio.TaskGroup() as tasks:
                writing = tasks.create_task(_write(context, session))
                others = [tasks.create_task(_report(sessions, session)), tasks.create_task(_failure(session))]
                try:
                    allowance = Allowance(time.monotonic())
                    async for request in requests:
                        _take(sessions, session, request)
                        if wait := allowance.wait(request.WhichOneof("message"), time.monotonic()):
                            await asyncio.sleep(wait)
                except DecodeError as error:
                    raise errors.InvalidText(f"a message of the stream cannot be parsed ({error})") from None
                session.finish()
                await writing
                for task in others:
                    task.cancel()
        finally:
            sessions.shut(session)
            log.info("batcher gone", extra=names)

    def _call_done(self, context: _Context) -> None:
        self._calls -= 1

    def _open_sessions(self) -> Sessions:
        if self._sessions is None:
            raise errors.NotReady("the model is still loading; try again", retry_after=1.0)
        return self._sessions


async def _hello(requests: AsyncIterator[wire.RunRequest]) -> wire.Hello:
    """The first message, which does not take long to come."""
    try:
        async with asyncio.timeout(HELLO_SECONDS):
            first = await anext(aiter(requests), None)
    except TimeoutError:
        raise errors.InvalidRequest(f"no hello came within {HELLO_SECONDS:g} s", field="hello") from None
    except DecodeError as error:
        raise errors.InvalidText(f"the first message of Run cannot be parsed ({error})") from None
    if first is None or first.WhichOneof("message") != "hello":
        raise errors.InvalidRequest("the first message of Run must be hello", field="hello")
    return first.hello


def _take(sessions: Sessions, session: Session, request: wire.RunRequest) -> None:
    if session.error is not None:
        return  # about to end
    session.heard = time.monotonic()
    kind = request.WhichOneof("message")
    if kind == "submit":
        session.say(sessions.submit(session, request.submit))
    elif kind == "cancel":
        if len(request.cancel.handles) > MAX_CANCEL:
            raise errors.InvalidRequest(
                f"cancel names {len(request.cancel.handles)} handles, at most {MAX_CANCEL} are taken",
                field="cancel.handles",
            )
        sessions.cancel(session, request.cancel.handles)
    elif kind == "ack":
        sessions.acknowledge(session, request.ack)
    elif kind == "ping":
        session.say(wire.RunResponse(pong=wire.Pong(nonce=request.ping.nonce)))
    elif kind == "quiesce":
        session.done = True
    elif kind == "hello":
        raise errors.InvalidRequest("hello comes once, first", field="hello")
    # Members of later versions are none of our business.


async def _write(context: _Context, session: Session) -> None:
    """Send what there is to say, until the batcher has half-closed and all of it is said."""
    while not session.complete:
        await session.has_news.wait()
        session.sending = True
        for response in session.news(time.monotonic()):
            try:
                await context.write(response)
            except grpc.aio.BaseError as error:
                raise errors.RequestCancelled("the batcher is gone") from error
        session.sending = False


async def _report(sessions: Sessions, session: Session) -> None:
    while True:
        session.say(wire.RunResponse(load=sessions.load()))
        sessions.share_credit()  # who was hungry may be so no more, though nothing else has happened
        await asyncio.sleep(LOAD_SECONDS)


async def _failure(session: Session) -> None:
    """Wait until the stream has to end, and raise why."""
    await session.failed.wait()
    assert session.error is not None, "what fails has a reason"
    raise session.error


def described(sessions: Sessions) -> wire.ModelDescription:
    """The model, as batchers are told of it."""
    model = sessions.model
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
        shared_block_tokens=sessions.shared_block_tokens,
    )
