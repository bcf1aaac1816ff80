"""Keep one long-lived `Run` stream to one worker, and submit and cancel jobs on it.

A link connects, sends Hello, and carries work until the stream breaks. Then it reports the jobs in flight as
failed and connects again. `receiver` handles what the worker sends. What is submitted and when, and what
follows a failure, is decided elsewhere (`coalescer`); a link only knows how many slots are free and whether
its worker is alive.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import grpc
from opentelemetry import trace

from headrace import errors, statuses
from headrace.batcher.job import Job
from headrace.batcher.links.failover import request_keys
from headrace.batcher.links.in_flight import InFlightSequences
from headrace.batcher.links.listener import LinkListener
from headrace.batcher.links.liveness import ASSUMED_PREFILL_RATE, PING_SECONDS, UNKNOWN_SECONDS, Liveness
from headrace.batcher.links.receiver import FRAME_WINDOW, Mismatch, Receiver
from headrace.channel import MAX_MESSAGE_BYTES, open_channel
from headrace.propagation import to_w3c
from headrace.runtime.breaker import CircuitBreaker
from headrace.runtime.rate import RateMeter
from headrace.tls.files import TlsReader
from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub

if TYPE_CHECKING:
    from headrace.v1.worker_service_pb2_grpc import WorkerServiceAsyncStub

log = logging.getLogger(__name__)

RECONNECT_SECONDS = (0.1, 0.5)  # the first and the longest pause between attempts
WATCH_SECONDS = 0.25  # between liveness checks
# A larger batch is sent in parts, because a message beyond the limit would break the stream for all its
# sequences.
_SUBMIT_BYTES = MAX_MESSAGE_BYTES // 4


class WorkerLink:
    """The link to one worker.

    target        its gRPC name
    fingerprint   of the batcher's tokenizer; a worker with another one is rejected
    tls           for a stream over TLS; None: plaintext
    server_name   the name in the worker's certificate; empty: the host of *target*

    connected         whether the worker has welcomed the current stream
    draining          whether the worker reports that it drains
    suspect           whether the worker appears stalled
    retiring          whether no more work is sent because the worker left the tier
    epoch             the number of the current stream
    problem           why the worker is not ready, for people
    others_backlog    prompt tokens of other batchers that wait at the worker
    step_seconds      mean time of an engine step; 0 while unknown
    """

    def __init__(
        self,
        target: str,
        *,
        fingerprint: str,
        batcher_id: str,
        listener: LinkListener,
        tls: TlsReader | None = None,
        server_name: str = "",
    ) -> None:
        self.target = target
        self.fingerprint = fingerprint
        self.worker_id = ""
        self.incarnation = 0
        self.model: wire.ModelDescription | None = None
        self.load = wire.Load()
        self.step_seconds = 0.0
        self.credit = wire.Credit()
        self.problem = "not connected yet"
        self.rate = RateMeter()
        self.breaker = CircuitBreaker()
        self.liveness = Liveness(time.monotonic())
        self.in_flight = InFlightSequences()
        self.others_backlog = 0
        self.connected = False
        self.draining = False
        self.suspect = False
        self.retiring = False
        self.epoch = 0
        self.receiver = Receiver(self, listener)
        self._batcher_id = batcher_id
        self._tls = tls
        self._server_name = server_name
        self._listener = listener
        self._batches = 0
        self._outgoing: asyncio.Queue[wire.RunRequest | None] = asyncio.Queue()

    @property
    def ready(self) -> bool:
        """Whether it is connected, and neither draining, suspect nor retiring."""
        return self.connected and not (self.draining or self.suspect or self.retiring)

    @property
    def outstanding(self) -> int:
        """The number of sequences at the worker."""
        return len(self.in_flight)

    @property
    def backlog(self) -> int:
        """Prompt tokens that wait at the worker to be computed, other batchers' included."""
        return self.in_flight.backlog + self.others_backlog

    @property
    def shared_block_tokens(self) -> int:
        """The block size of the worker's prefix cache, in tokens; 0 if its sequences share no blocks."""
        return self.model.shared_block_tokens if self.model is not None else 0

    @property
    def step_tokens(self) -> int:
        """The most tokens that one step of the worker computes; 0 if unknown."""
        return self.model.step_tokens if self.model is not None else 0

    @property
    def prompt_seconds(self) -> float:
        """How long the worker's next step may take for the prompt tokens that wait there, in seconds."""
        tokens, rate = min(self.backlog, self.step_tokens), self.load.prefill_tokens_per_second
        return tokens / rate if rate > 0 else min(tokens / ASSUMED_PREFILL_RATE, UNKNOWN_SECONDS)

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer that the worker accepts."""
        return self.model.context_length if self.model is not None else 0

    def has(self, features: Iterable[str]) -> bool:
        """Return whether the worker's engine has all of *features*."""
        offered = self.model.features if self.model is not None else ()
        return all(feature in offered for feature in features)

    @property
    def kind(self) -> str:
        """What the worker runs, and on what: EXACT workers of equal kind give equal answers."""
        if (model := self.model) is None:
            return ""
        device = model.device.partition(":")[0]  # GPUs compute alike, but not like a CPU
        return f"{model.weights_fingerprint}/{model.dtype}/{device}/{model.determinism}"

    def free_slots(self, now: float) -> int:
        """Return how many more sequences may be sent now."""
        if not self.ready:
            return 0
        return self.breaker.allowed(now, max(self.credit.sequences - len(self.in_flight), 0))

    def responded_after(self, moment: float) -> bool:
        """Return whether the worker has answered a ping that was sent after *moment*; sends one if none was.

        A message that arrived after *moment* proves nothing: it may have been sent before the worker died.
        """
        if self.liveness.pinged_at <= moment:
            self._ping(time.monotonic())
        return self.liveness.alive_at > moment

    def submit(self, batch: list[Job], batch_span: trace.Span, now: float) -> int:
        """Send a batch, of at most `free_slots` jobs. Returns its number."""
        self._batches += 1
        if not self.in_flight:
            self.liveness.became_busy(now)
        self.breaker.sent()
        request, size = self._new_submit(batch_span), 0
        for job in batch:
            if size > _SUBMIT_BYTES:
                self.send(request)
                request, size = self._new_submit(batch_span), 0
            sequence = request.submit.sequences.add(
                handle=self.in_flight.add(job),
                request_id=job.request_id,
                attempt=job.attempt,
                prompt_ids=job.prompt_ids,
                grammar=job.form.grammar,
                resume_ids=job.answer_ids,
                prefix_scope=job.scope,
                each_step=job.each_step,
                sampling=job.sampling,
                priority=job.priority,
            )
            _set_trace(sequence.trace, job.span)
            if job.deadline.exists:
                sequence.ttl.FromNanoseconds(max(int(job.deadline.left(now) * 1e9), 0))
            size += sequence.ByteSize()
        self.send(request)
        return self._batches

    def _new_submit(self, batch_span: trace.Span) -> wire.RunRequest:
        request = wire.RunRequest()
        request.submit.batch_id = self._batches
        _set_trace(request.submit.batch_trace, batch_span)
        return request

    def cancel(self, job: Job) -> bool:
        """Cancel a job. Returns False if it is not here. Its handle is free when the worker has confirmed."""
        handle = self.in_flight.abandon(job)
        if handle is None:
            return False
        self.breaker.release_probe()
        self.send(wire.RunRequest(cancel=wire.Cancel(handles=[handle])))
        return True

    def retire(self) -> None:
        """Send no more work; `run` returns when the sequences in flight have ended."""
        self.retiring = True
        self.send(None)

    def send(self, request: wire.RunRequest | None) -> None:
        """Queue a message for the worker; None announces that no more batches follow."""
        self._outgoing.put_nowait(request)

    async def run(self) -> None:
        """Keep the stream open, and reconnect when it breaks, until cancelled or retired."""
        pause, logged = RECONNECT_SECONDS[0], ""
        async with open_channel(
            self.target, tls=self._tls, server_name=self._server_name, direct=True
        ) as channel:
            stub = WorkerServiceStub(channel)
            while not self.retiring:
                was_connected, unexpected = False, None
                try:
                    await self._serve_stream(stub)
                    self.problem = "the worker ended the stream"
                except (errors.HeadraceError, Mismatch) as error:
                    self.problem = str(error)
                except Exception as error:
                    # Whatever this worker sent, the batcher and its other workers must continue.
                    self.problem, unexpected = f"unexpected {type(error).__name__}, see the log", error
                finally:
                    was_connected, self.connected = self.connected, False
                    self._fail_in_flight()
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    # Before Python 3.13 a task group that fails while it is cancelled loses the cancellation.
                    raise asyncio.CancelledError
                if was_connected or self.problem != logged:
                    logged = self.problem
                    log.log(
                        logging.WARNING if was_connected else logging.INFO,
                        "worker not connected",
                        extra={"target": self.target, "problem": self.problem},
                        exc_info=unexpected,
                    )
                pause = RECONNECT_SECONDS[0] if was_connected else min(pause * 2, RECONNECT_SECONDS[1])
                if not self.retiring:
                    await asyncio.sleep(pause)

    async def _serve_stream(self, stub: WorkerServiceAsyncStub) -> None:
        """Run one stream, from Hello to its end."""
        self.epoch += 1
        self.credit = wire.Credit()
        self.draining = self.suspect = False
        self._outgoing = asyncio.Queue()
        self.liveness = Liveness(time.monotonic())
        self.receiver = Receiver(self, self._listener)
        # wait_for_ready is off: a refused connection is a result, and `run` pauses between attempts.
        call = stub.Run()
        try:
            async with asyncio.TaskGroup() as tasks:
                # From the start: a peer that accepts the connection and sends nothing must not hold the link.
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
                handle = self.receiver.handle
                async for response in call:
                    handle(response)
                writer.cancel()
                watcher.cancel()
        except grpc.aio.AioRpcError as error:
            raise self._ended_by(error) from error
        except BaseExceptionGroup as group:
            # Reader and writer may both notice that the stream broke; the server's status explains most.
            rpc, _ = group.split(grpc.aio.AioRpcError)
            if rpc is not None:
                raise self._ended_by(_first(rpc)) from group
            usage, _ = group.split((asyncio.InvalidStateError, grpc.aio.UsageError))
            if usage is not None:
                raise errors.WorkerLost(f"the stream to {self.target} broke") from group
            raise errors.unwrap(group) from None
        finally:
            call.cancel()

    def _ended_by(self, error: grpc.aio.AioRpcError) -> errors.HeadraceError:
        """Return why the worker ended the stream. Where that is lost, assume the reason of the last time."""
        if error.details() == statuses.BROKE_IN_WRITE:
            return errors.WorkerLost(self.problem or f"the stream to {self.target} broke")
        return statuses.from_rpc_error(error)

    async def _write(self, call: grpc.aio.StreamStreamCall[wire.RunRequest, wire.RunResponse]) -> None:
        while True:
            request = await self._outgoing.get()
            if request is None:
                await call.write(wire.RunRequest(quiesce=wire.Quiesce()))
            else:
                await call.write(request)
            if self.retiring and not self.in_flight:
                await call.done_writing()
                return

    async def _watch(self) -> None:
        """Send pings and check liveness. Raises WorkerLost if the connection should be closed."""
        checked = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            late, checked = now - checked - WATCH_SECONDS, now
            if late > WATCH_SECONDS:
                self.liveness.excuse(late)
            if now - self.liveness.pinged_at >= PING_SECONDS - WATCH_SECONDS / 2:
                self._ping(now)
            running = len(self.in_flight)
            prompt_seconds = self.prompt_seconds
            if problem := self.liveness.lost(now, running=running, prompt_seconds=prompt_seconds):
                raise errors.WorkerLost(problem)
            suspect = self.connected and self.liveness.suspect(
                now, running=running, prompt_seconds=prompt_seconds
            )
            if suspect and not self.suspect:
                log.warning("worker is suspect", extra={"target": self.target, "running": running})
                self.breaker.record_fault(now, request_keys(self.in_flight.jobs()))
            self.suspect = suspect
            if suspect:
                self._listener.changed()  # other workers may have free slots by now

    def _ping(self, now: float) -> None:
        self.send(wire.RunRequest(ping=wire.Ping(nonce=self.liveness.ping(now))))

    def _fail_in_flight(self) -> None:
        """Report all sequences at the worker as failed, because the stream is gone."""
        in_flight, self.in_flight = self.in_flight, InFlightSequences()
        jobs = in_flight.jobs()
        if len(in_flight) and not (
            self.draining or self.suspect
        ):  # for a suspect the fault is recorded already
            self.breaker.record_fault(time.monotonic(), request_keys(jobs))
        self.breaker.release_probe()  # a probe in flight is gone with the stream
        error = errors.WorkerLost(f"the worker at {self.target} was lost ({self.problem}); try again")
        for job in jobs:
            self._listener.failed(self, job, error)
        self._listener.changed()


def _set_trace(context: wire.TraceContext, span: trace.Span) -> None:
    # A worker records no span of a request without a trace.
    if span.get_span_context().trace_flags.sampled:
        context.traceparent, context.tracestate = to_w3c(span)


def _first(group: BaseExceptionGroup[grpc.aio.AioRpcError]) -> grpc.aio.AioRpcError:
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    assert isinstance(inner, grpc.aio.AioRpcError)
    return inner
