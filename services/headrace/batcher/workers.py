"""One long-lived `Run` stream to one worker: batches down, step frames up, back to their jobs.

A link dials, says hello, checks that the worker speaks the batcher's tokens, and then carries work until
the stream breaks; it fails what was under way and dials again. What may be sent, and when, is decided in
`coalescer`; a link only knows how much room there is.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from opentelemetry import propagate, trace

from headrace import errors
from headrace.batcher.job import End, Job
from headrace.client import open_channel
from headrace.runtime.rate import RateMeter
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub

if TYPE_CHECKING:
    from headrace.v1.worker_service_pb2_grpc import WorkerServiceAsyncStub

log = logging.getLogger(__name__)

PING_SECONDS = 1.0
SILENCE_SECONDS = 10.0  # a worker that says nothing for so long is taken for lost
RECONNECT_SECONDS = (0.1, 2.0)  # first and longest pause between attempts


class Mismatch(Exception):
    """The worker runs another model than this batcher tokenises for."""


@dataclass(slots=True)
class _Flight:
    """A job at the worker. A job that nobody waits for stays until the worker's last word on it."""

    job: Job
    received: int
    abandoned: bool = False


class WorkerLink:
    """The stream to one worker.

    target        its gRPC name
    fingerprint   of the batcher's tokenizer; a worker with another one is refused
    on_change     called when room or readiness may have changed
    """

    def __init__(self, target: str, *, fingerprint: str, batcher_id: str) -> None:
        self.target = target
        self.worker_id = ""
        self.model: wire.ModelDescription | None = None
        self.load = wire.Load()
        self.problem = "not connected yet"
        self.rate = RateMeter()
        self.on_change: Callable[[], None] = lambda: None
        self._fingerprint = fingerprint
        self._batcher_id = batcher_id
        self._epoch = 0
        self._batches = 0
        self._credit = wire.Credit()
        self._flights: dict[int, _Flight] = {}
        self._handles: dict[Job, int] = {}
        self._free_handles: list[int] = []
        self._outgoing: asyncio.Queue[wire.RunRequest] = asyncio.Queue()
        self._ready = False
        self._heard = 0.0

    @property
    def ready(self) -> bool:
        """Connected, welcomed, and not draining."""
        return self._ready

    @property
    def outstanding(self) -> int:
        """Sequences at the worker."""
        return len(self._flights)

    @property
    def room(self) -> int:
        """How many more sequences it takes now."""
        return max(self._credit.sequences - len(self._flights), 0) if self._ready else 0

    def submit(self, batch: list[Job], batch_span: trace.Span, now: float) -> int:
        """Send a batch, of at most `room` jobs; returns its number."""
        self._batches += 1
        message = wire.Submit(batch_id=self._batches, batch_trace=_trace_context(batch_span))
        for job in batch:
            handle = heapq.heappop(self._free_handles) if self._free_handles else len(self._flights)
            self._flights[handle] = _Flight(job, received=len(job.resume_ids))
            self._handles[job] = handle
            sequence = message.sequences.add(
                handle=handle,
                request_id=job.request_id,
                attempt=job.attempt,
                prompt_ids=job.prompt_ids,
                resume_ids=job.resume_ids,
                sampling=job.sampling,
                priority=job.priority,
                trace=_trace_context(job.span),
            )
            if job.expires is not None:
                sequence.ttl.FromNanoseconds(max(int((job.expires - now) * 1e9), 0))
        self._outgoing.put_nowait(wire.RunRequest(submit=message))
        return self._batches

    def cancel(self, job: Job) -> bool:
        """Let a job go; false if it is not here. Its handle is free when the worker has confirmed."""
        handle = self._handles.pop(job, None)
        if handle is None:
            return False
        self._flights[handle].abandoned = True
        self._outgoing.put_nowait(wire.RunRequest(cancel=wire.Cancel(handles=[handle])))
        return True

    async def run(self) -> None:
        """Keep the stream open, dialling again when it breaks, until cancelled."""
        pause, told = RECONNECT_SECONDS[0], ""
        async with open_channel(self.target) as channel:
            stub = WorkerServiceStub(channel)
            while True:
                try:
                    await self._converse(stub)
                    self.problem = "the worker ended the stream"
                except (errors.HeadraceError, Mismatch) as error:
                    self.problem = str(error)
                except TimeoutError:
                    self.problem = f"nothing heard for {SILENCE_SECONDS:g} s"
                finally:
                    was_ready, self._ready = self._ready, False
                    self._lose()
                if was_ready or self.problem != told:
                    told = self.problem
                    log.log(
                        logging.WARNING if was_ready else logging.INFO,
                        "worker not connected",
                        extra={"target": self.target, "problem": self.problem},
                    )
                pause = RECONNECT_SECONDS[0] if was_ready else min(pause * 2, RECONNECT_SECONDS[1])
                await asyncio.sleep(pause)

    async def _converse(self, stub: WorkerServiceAsyncStub) -> None:
        """One stream, from hello to its end."""
        self._epoch += 1
        self._outgoing = asyncio.Queue()
        # wait_for_ready is off: a refused connection is an answer, and the pause is ours.
        call = stub.Run()
        try:
            await call.write(
                wire.RunRequest(hello=wire.Hello(batcher_id=self._batcher_id, epoch=self._epoch))
            )
            self._heard = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(self._write(call))
                pinger = tasks.create_task(self._ping())
                async for response in call:
                    self._heard = time.monotonic()
                    self._take(response)
                writer.cancel()
                pinger.cancel()
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error) from error
        except BaseExceptionGroup as group:
            # Reader and writer may both notice that the stream broke; the server's word says most.
            rpc, _ = group.split(grpc.aio.AioRpcError)
            if rpc is not None:
                raise errors.from_rpc_error(_first(rpc)) from group
            usage, _ = group.split((asyncio.InvalidStateError, grpc.aio.UsageError))
            if usage is not None:
                raise errors.WorkerLost(f"the stream to {self.target} broke") from group
            raise errors.unwrap(group) from None
        finally:
            call.cancel()

    async def _write(self, call: grpc.aio.StreamStreamCall[wire.RunRequest, wire.RunResponse]) -> None:
        while True:
            await call.write(await self._outgoing.get())

    async def _ping(self) -> None:
        nonce = 0
        while time.monotonic() - self._heard < SILENCE_SECONDS:
            await asyncio.sleep(PING_SECONDS)
            nonce += 1
            self._outgoing.put_nowait(wire.RunRequest(ping=wire.Ping(nonce=nonce)))
        raise TimeoutError

    def _take(self, response: wire.RunResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "step":
            now = time.monotonic()
            for delta in response.step.deltas:
                self._take_delta(delta, now)
        elif kind == "admission":
            for verdict in response.admission.verdicts:
                if verdict.state == wire.ADMISSION_STATE_REFUSED:
                    self._finish(verdict.handle, verdict.attempt, error=errors.from_status(verdict.error))
        elif kind == "welcome":
            self._welcome(response.welcome)
        elif kind == "load":
            self.load = response.load
        elif kind == "credit":
            if response.credit.generation > self._credit.generation:
                self._credit = response.credit
        elif kind == "drain":
            self._ready = False
            self.problem = "the worker is draining"
            log.info("worker drains", extra={"target": self.target})
        self.on_change()

    def _welcome(self, welcome: wire.Welcome) -> None:
        model = welcome.model
        if model.tokenizer_fingerprint != self._fingerprint:
            raise Mismatch(
                f"worker {self.target} runs {model.name} with tokenizer {model.tokenizer_fingerprint}, this "
                f"batcher's is {self._fingerprint}: give both the same model"
            )
        self.worker_id = welcome.worker_id
        self.model = model
        self._credit = welcome.credit
        self._ready = True
        self.problem = ""
        log.info("worker connected", extra={"target": self.target, "worker": self.worker_id})

    def _take_delta(self, delta: wire.SequenceDelta, now: float) -> None:
        flight = self._flights.get(delta.handle)
        if flight is None or delta.attempt != flight.job.attempt:
            return  # of a sequence that is over
        skip = flight.received - delta.offset
        if skip < 0:
            raise errors.WorkerLost(
                f"worker {self.worker_id} skipped tokens: offset {delta.offset}, expected {flight.received}"
            )
        ids, logprobs = list(delta.token_ids[skip:]), list(delta.logprobs[skip:])
        flight.received += len(ids)
        if ids:
            self.rate.add(now, len(ids))
            if not flight.abandoned:
                flight.job.inbox.put(ids, logprobs)
        if delta.HasField("error"):
            self._finish(delta.handle, delta.attempt, error=errors.from_status(delta.error))
        elif delta.finish != pb.FINISH_REASON_UNSPECIFIED:
            self._finish(delta.handle, delta.attempt, end=End(delta.finish, delta.usage, delta.timing))

    def _finish(
        self,
        handle: int,
        attempt: int,
        *,
        end: End | None = None,
        error: errors.HeadraceError | None = None,
    ) -> None:
        flight = self._flights.get(handle)
        if flight is None or flight.job.attempt != attempt:
            return
        del self._flights[handle]
        heapq.heappush(self._free_handles, handle)
        self._handles.pop(flight.job, None)
        if flight.abandoned:
            return
        if error is not None:
            flight.job.inbox.fail(error)
        elif end is not None:
            flight.job.inbox.end(end)

    def _lose(self) -> None:
        """The stream is gone and with it everything at the worker."""
        flights = list(self._flights.values())
        self._flights.clear()
        self._handles.clear()
        self._free_handles.clear()
        for flight in flights:
            if not flight.abandoned:
                flight.job.inbox.fail(
                    errors.WorkerLost(f"the worker at {self.target} was lost ({self.problem}); try again")
                )
        self.on_change()


def _trace_context(span: trace.Span) -> wire.TraceContext:
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context=trace.set_span_in_context(span))
    return wire.TraceContext(
        traceparent=carrier.get("traceparent", ""), tracestate=carrier.get("tracestate", "")
    )


def _first(group: BaseExceptionGroup[grpc.aio.AioRpcError]) -> grpc.aio.AioRpcError:
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    assert isinstance(inner, grpc.aio.AioRpcError)
    return inner
