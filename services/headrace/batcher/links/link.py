"""One long-lived `Run` stream to one worker: batches down, step frames up, back to their jobs.

A link dials, says hello, checks that the worker speaks the batcher's tokens, and then carries work until
the stream breaks; it reports what was under way as failed and dials again. What may be sent, and when,
and what follows a failure, is decided elsewhere (`coalescer`); a link only knows how much room there is
and whether its worker lives.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import grpc
from opentelemetry import trace

from headrace import errors
from headrace.batcher.inbox import End
from headrace.batcher.job import Job
from headrace.batcher.links.breaker import Breaker
from headrace.batcher.links.failover import requests, workers_fault
from headrace.batcher.links.in_flight import Flight, Flights, check_tokens
from headrace.batcher.links.listener import Sink
from headrace.batcher.links.liveness import PING_SECONDS, Liveness
from headrace.channel import MAX_MESSAGE_BYTES, open_channel
from headrace.propagation import to_w3c
from headrace.runtime.rate import RateMeter
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub

if TYPE_CHECKING:
    from headrace.v1.worker_service_pb2_grpc import WorkerServiceAsyncStub

log = logging.getLogger(__name__)

RECONNECT_SECONDS = (0.1, 0.5)  # first and longest pause between attempts
WATCH_SECONDS = 0.25  # between looks at whether the worker lives
FRAME_WINDOW = 32  # step frames that the worker may send before it hears that they were taken in
_FINISHES = frozenset(
    {
        pb.FINISH_REASON_STOP,
        pb.FINISH_REASON_LENGTH,
        pb.FINISH_REASON_CANCELLED,
        pb.FINISH_REASON_DEADLINE,
    }
)
_ACK_EVERY = FRAME_WINDOW // 4
# A batch that holds more is sent in parts: a message beyond the limit would break the stream for everybody.
_SUBMIT_BYTES = MAX_MESSAGE_BYTES // 4


class Mismatch(Exception):
    """The worker runs another model than this batcher tokenises for."""


class WorkerLink:
    """The stream to one worker.

    target        its gRPC name
    fingerprint   of the batcher's tokenizer; a worker with another one is refused
    """

    def __init__(self, target: str, *, fingerprint: str, batcher_id: str, sink: Sink) -> None:
        self.target = target
        self.worker_id = ""
        self.incarnation = 0
        self.model: wire.ModelDescription | None = None
        self.load = wire.Load()
        self.problem = "not connected yet"
        self.rate = RateMeter()
        self.breaker = Breaker()
        self.liveness = Liveness(time.monotonic())
        self.flights = Flights()
        self.credit = wire.Credit()
        self.draining = False
        self.suspect = False
        self.retiring = False
        self.epoch = 0
        self._fingerprint = fingerprint
        self._batcher_id = batcher_id
        self._sink = sink
        self._batches = 0
        self._outgoing: asyncio.Queue[wire.RunRequest | None] = asyncio.Queue()
        self._welcomed = False
        self._acked = 0
        self._faulted: list[Job] = []
        self.others_backlog = 0  # of prompt tokens at the worker, other batchers'

    @property
    def connected(self) -> bool:
        """The worker has welcomed this stream, and the stream has not broken."""
        return self._welcomed

    @property
    def ready(self) -> bool:
        """Connected, and neither draining, nor suspect, nor on its way out."""
        return self._welcomed and not (self.draining or self.suspect or self.retiring)

    @property
    def outstanding(self) -> int:
        """Sequences at the worker."""
        return len(self.flights)

    @property
    def backlog(self) -> int:
        """Prompt tokens that wait at the worker to be computed, other batchers' included."""
        return self.flights.backlog + self.others_backlog

    @property
    def shared_block_tokens(self) -> int:
        """Tokens of the blocks in which its sequences share what is computed; 0 if they share nothing."""
        return self.model.shared_block_tokens if self.model is not None else 0

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer that it takes."""
        return self.model.context_length if self.model is not None else 0

    @property
    def kind(self) -> str:
        """What it runs, and on what: workers of equal kind give equal answers, if they are EXACT."""
        if (model := self.model) is None:
            return ""
        device = model.device.partition(":")[0]  # one GPU computes as another does, but not as a CPU
        return f"{model.weights_fingerprint}/{model.dtype}/{device}/{model.determinism}"

    def room(self, now: float) -> int:
        """How many more sequences it takes now."""
        if not self.ready:
            return 0
        return self.breaker.room(now, max(self.credit.sequences - len(self.flights), 0))

    def lived_after(self, moment: float) -> bool:
        """Whether it has answered a question asked after *moment*; if none was asked, this asks one.

        That it was heard is not enough: what a process said before it died may still lie on the way.
        """
        if self.liveness.pinged_at <= moment:
            self._ping(time.monotonic())
        return self.liveness.answered_at > moment

    def submit(self, batch: list[Job], batch_span: trace.Span, now: float) -> int:
        """Send a batch, of at most `room` jobs; returns its number."""
        self._batches += 1
        if not self.flights:
            self.liveness.busy(now)
        self.breaker.sent()
        message, size = wire.Submit(batch_id=self._batches, batch_trace=_trace_context(batch_span)), 0
        for job in batch:
            if size > _SUBMIT_BYTES:
                self._outgoing.put_nowait(wire.RunRequest(submit=message))
                message, size = wire.Submit(batch_id=message.batch_id, batch_trace=message.batch_trace), 0
            sequence = message.sequences.add(
                handle=self.flights.board(job),
                request_id=job.request_id,
                attempt=job.attempt,
                prompt_ids=job.prompt_ids,
                resume_ids=job.answer_ids,
                prefix_scope=job.scope,
                sampling=job.sampling,
                priority=job.priority,
                trace=_trace_context(job.span),
            )
            if job.expires is not None:
                sequence.ttl.FromNanoseconds(max(int((job.expires - now) * 1e9), 0))
            size += sequence.ByteSize()
        self._outgoing.put_nowait(wire.RunRequest(submit=message))
        return self._batches

    def cancel(self, job: Job) -> bool:
        """Let a job go; false if it is not here. Its handle is free when the worker has confirmed."""
        handle = self.flights.abandon(job)
        if handle is None:
            return False
        self.breaker.forgive()
        self._outgoing.put_nowait(wire.RunRequest(cancel=wire.Cancel(handles=[handle])))
        return True

    def retire(self) -> None:
        """Send no more work here; `run` returns when what is under way has ended."""
        self.retiring = True
        self._outgoing.put_nowait(None)

    async def run(self) -> None:
        """Keep the stream open, dialling again when it breaks, until cancelled or retired."""
        pause, reported = RECONNECT_SECONDS[0], ""
        async with open_channel(self.target, direct=True) as channel:
            stub = WorkerServiceStub(channel)
            while not self.retiring:
                was_connected, unexpected = False, None
                try:
                    await self._converse(stub)
                    self.problem = "the worker ended the stream"
                except (errors.HeadraceError, Mismatch) as error:
                    self.problem = str(error)
                except Exception as error:
                    # Whatever this worker sent or did, the batcher and its other workers go on.
                    self.problem, unexpected = f"unexpected {type(error).__name__}, see the log", error
                finally:
                    was_connected, self._welcomed = self._welcomed, False
                    self._lose()
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    # Before Python 3.13 a task group that fails while it is cancelled loses the cancellation.
                    raise asyncio.CancelledError
                if was_connected or self.problem != reported:
                    reported = self.problem
                    log.log(
                        logging.WARNING if was_connected else logging.INFO,
                        "worker not connected",
                        extra={"target": self.target, "problem": self.problem},
                        exc_info=unexpected,
                    )
                pause = RECONNECT_SECONDS[0] if was_connected else min(pause * 2, RECONNECT_SECONDS[1])
                if not self.retiring:
                    await asyncio.sleep(pause)

    async def _converse(self, stub: WorkerServiceAsyncStub) -> None:
        """One stream, from hello to its end."""
        self.epoch += 1
        self.credit = wire.Credit()
        self.draining = self.suspect = False
        self._acked = 0
        self._outgoing = asyncio.Queue()
        self.liveness = Liveness(time.monotonic())
        # wait_for_ready is off: a refused connection is an answer, and the pause is ours.
        call = stub.Run()
        try:
            async with asyncio.TaskGroup() as tasks:
                # From the first moment on: a peer that accepts and says nothing must not hold us.
                watcher = tasks.create_task(self._watch())
                await call.write(
                    wire.RunRequest(
                        hello=wire.Hello(
                            batcher_id=self._batcher_id,
                            epoch=self.epoch,
                            frame_window=FRAME_WINDOW,
                            acks_credit=True,
                        )
                    )
                )
                writer = tasks.create_task(self._write(call))
                async for response in call:
                    self._take(response)
                writer.cancel()
                watcher.cancel()
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
            request = await self._outgoing.get()
            if request is None:  # on the way out: no more submits will come
                await call.write(wire.RunRequest(quiesce=wire.Quiesce()))
            else:
                await call.write(request)
            if self.retiring and not self.flights:
                await call.done_writing()
                return

    async def _watch(self) -> None:
        """Ping, and see whether the worker lives. Raises WorkerLost if it does not."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            late, looked = now - looked - WATCH_SECONDS, now
            if late > WATCH_SECONDS:
                self.liveness.excuse(late)
            if now - self.liveness.pinged_at >= PING_SECONDS - WATCH_SECONDS / 2:
                self._ping(now)
            running = len(self.flights)
            if problem := self.liveness.lost(now, running=running):
                raise errors.WorkerLost(problem)
            suspect = self._welcomed and self.liveness.suspect(now, running=running)
            if suspect and not self.suspect:
                log.warning("worker is suspect", extra={"target": self.target, "running": running})
                self.breaker.fail(now, requests(self.flights.jobs()))
            self.suspect = suspect
            if suspect:
                self._sink.changed()  # others may have room by now

    def _ping(self, now: float) -> None:
        self._outgoing.put_nowait(wire.RunRequest(ping=wire.Ping(nonce=self.liveness.ping(now))))

    def _take(self, response: wire.RunResponse) -> None:
        now = time.monotonic()
        self.liveness.heard(now)
        kind = response.WhichOneof("message")
        if kind == "step":
            self._take_step(response.step, now)
        elif kind == "admission":
            for verdict in response.admission.verdicts:
                if verdict.state == wire.ADMISSION_STATE_REFUSED:
                    self._land(verdict.handle, verdict.attempt, errors.from_status(verdict.error))
            self._blame(now)
        elif kind == "welcome":
            self._welcome(response.welcome)
        elif kind == "load":
            self.load = response.load
            self.others_backlog = max(int(response.load.uncomputed_prompt_tokens) - self.flights.backlog, 0)
        elif kind == "credit":
            if response.credit.generation > self.credit.generation:
                self.credit = response.credit
                self._ack()  # behind all that was submitted by the credit before
        elif kind == "pong":
            self.liveness.pong(response.pong.nonce)
        elif kind == "drain":
            self.draining = True
            self.problem = "the worker is draining"
            log.info("worker drains", extra={"target": self.target})
        if self.retiring and not self.flights:
            self._outgoing.put_nowait(None)
        self._sink.changed()

    def _welcome(self, welcome: wire.Welcome) -> None:
        model = welcome.model
        if welcome.epoch != self.epoch:
            raise Mismatch(f"worker {self.target} answers to stream {welcome.epoch}, this is {self.epoch}")
        if model.tokenizer_fingerprint != self._fingerprint:
            raise Mismatch(
                f"worker {self.target} runs {model.name} with tokenizer {model.tokenizer_fingerprint}, this "
                f"batcher's is {self._fingerprint}: give both the same model"
            )
        if welcome.incarnation != self.incarnation:
            self._sink.renewed(self)
        self.incarnation = welcome.incarnation
        self.worker_id = welcome.worker_id
        self.model = model
        self.credit = welcome.credit
        self.problem = ""
        self.liveness.pong(0)
        self._welcomed = True
        log.info("worker connected", extra={"target": self.target, "worker": self.worker_id})

    def _take_step(self, step: wire.Step, now: float) -> None:
        self.liveness.stepped(now)
        self.suspect = False
        for delta in step.deltas:
            self._take_delta(delta, now)
        self._blame(now)
        if step.frame - self._acked >= _ACK_EVERY:
            self._acked = step.frame
            self._ack()

    def _ack(self) -> None:
        ack = wire.Ack(frame=self._acked, credit_generation=self.credit.generation)
        self._outgoing.put_nowait(wire.RunRequest(ack=ack))

    def _take_delta(self, delta: wire.SequenceDelta, now: float) -> None:
        arrived = self.flights.arrive(delta)
        if arrived is None:
            return
        flight, ids, logprobs = arrived
        if ids:
            vocabulary = self.model.vocabulary_size if self.model is not None else 0
            check_tokens(flight, ids, logprobs, vocabulary=vocabulary)
            self.rate.add(now, len(ids))
        if delta.HasField("cached_tokens"):
            self._sink.prefilled(self, flight.job, delta.cached_tokens)
        left_out = self._hand_over(flight, ids, logprobs)
        if delta.HasField("error"):
            self._land(delta.handle, delta.attempt, errors.from_status(delta.error))
            return
        ended = delta.finish != pb.FINISH_REASON_UNSPECIFIED
        if ended and delta.finish not in _FINISHES:
            raise errors.WorkerLost(f"the worker ended a sequence with {delta.finish}, which is no reason")
        if not flight.abandoned and (left_out or (flight.job.inbox.full and not ended)):
            self._sink.full(self, flight.job)
        if ended:
            end = End(delta.finish, delta.usage, delta.timing)
            self._land(delta.handle, delta.attempt, end)

    @staticmethod
    def _hand_over(flight: Flight, ids: list[int], logprobs: list[float]) -> int:
        """Put tokens where they are read; returns how many found no room there, and are forgotten."""
        job = flight.job
        taken = 0 if flight.abandoned else job.inbox.put(ids, logprobs)
        job.generated += ids[:taken]
        job.history.wasted += len(ids) - taken
        return len(ids) - taken

    def _land(self, handle: int, attempt: int, last: End | errors.HeadraceError) -> None:
        flight = self.flights.land(handle, attempt)
        if flight is None:
            return
        if isinstance(last, errors.HeadraceError) and workers_fault(last):
            self._faulted.append(flight.job)
        elif isinstance(last, End) and last.reason != pb.FINISH_REASON_CANCELLED:
            self.breaker.succeed()
        elif not flight.abandoned:
            self.breaker.forgive()  # refused or handed back: that is no verdict
        if flight.abandoned:
            return
        if isinstance(last, End):
            self._sink.ended(self, flight.job, last)
        else:
            self._sink.failed(self, flight.job, last)

    def _blame(self, now: float) -> None:
        """Count what one message reported as faults of the worker: once, for one step may hit them all."""
        if self._faulted:
            faulted, self._faulted = self._faulted, []
            self.breaker.fail(now, requests(faulted))

    def _lose(self) -> None:
        """The stream is gone and with it everything at the worker."""
        flights, self.flights = self.flights, Flights()
        jobs = flights.jobs()
        if len(flights) and not (self.draining or self.suspect):  # of a suspect it is counted already
            self.breaker.fail(time.monotonic(), requests(jobs))
        self.breaker.forgive()  # a probe that was under way went with the stream
        error = errors.WorkerLost(f"the worker at {self.target} was lost ({self.problem}); try again")
        for job in jobs:
            self._sink.failed(self, job, error)
        self._sink.changed()


def _trace_context(span: trace.Span) -> wire.TraceContext:
    traceparent, tracestate = to_w3c(span)
    return wire.TraceContext(traceparent=traceparent, tracestate=tracestate)


def _first(group: BaseExceptionGroup[grpc.aio.AioRpcError]) -> grpc.aio.AioRpcError:
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    assert isinstance(inner, grpc.aio.AioRpcError)
    return inner
