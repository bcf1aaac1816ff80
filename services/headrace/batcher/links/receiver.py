"""Handle the messages of one stream from a worker: hand tokens to their jobs and report what ended.

The receiver updates the state of its link (`link`), accounts for sequences (`in_flight`) and reports to the
listener. It neither reads nor writes the stream.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from headrace import errors, statuses
from headrace.batcher.inbox import SequenceEnd
from headrace.batcher.job import Job
from headrace.batcher.links.failover import is_worker_fault, request_keys
from headrace.batcher.links.in_flight import InFlightSequence, check_tokens
from headrace.batcher.links.listener import LinkListener
from headrace.batcher.token_details import Score, prompt_parts
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire

if TYPE_CHECKING:
    from headrace.batcher.links.link import WorkerLink

log = logging.getLogger(__name__)

FRAME_WINDOW = 32  # step frames that the worker may send without an acknowledgement
_ACK_EVERY = FRAME_WINDOW // 4
_FINISHES = frozenset(
    {
        pb.FINISH_REASON_STOP,
        pb.FINISH_REASON_LENGTH,
        pb.FINISH_REASON_CANCELLED,
        pb.FINISH_REASON_DEADLINE,
    }
)


class Mismatch(Exception):
    """The worker runs another model than the one this batcher tokenises for."""


class Receiver:
    """Handles the messages of one stream. A new stream gets a new receiver."""

    def __init__(self, link: WorkerLink, listener: LinkListener) -> None:
        self._link = link
        self._listener = listener
        self._acked = 0
        # By the message that is being handled.
        self._changed = False  # free slots, the backlog, or the worker's readiness
        self._tokens = 0
        self._faulted: list[Job] = []

    def handle(self, response: wire.RunResponse) -> None:
        """Handle one message. Raises Mismatch, or WorkerLost for a message that no sound worker sends."""
        link, now = self._link, time.monotonic()
        link.liveness.received(now)
        kind = response.WhichOneof("message")
        # Most steps and admissions change nothing that the queue waits for.
        self._changed = kind not in ("step", "admission")
        if kind == "step":
            self._handle_step(response.step, now)
        elif kind == "admission":
            for verdict in response.admission.verdicts:
                if verdict.state == wire.ADMISSION_STATE_REFUSED:
                    self._end(verdict.handle, verdict.attempt, statuses.from_status(verdict.error))
            self._record_faults(now)
        elif kind == "welcome":
            self._handle_welcome(response.welcome)
        elif kind == "load":
            link.load = response.load
            link.step_seconds = response.load.step_time.ToNanoseconds() / 1e9
            backlog = int(response.load.uncomputed_prompt_tokens)
            link.others_backlog = max(backlog - link.in_flight.backlog, 0)
        elif kind == "credit":
            if response.credit.generation > link.credit.generation:
                link.credit = response.credit
                self._acknowledge()  # after all that was submitted under the previous credit
        elif kind == "pong":
            link.liveness.pong(response.pong.nonce)
        elif kind == "drain":
            link.draining = True
            link.problem = "the worker is draining"
            log.info("worker drains", extra={"target": link.target})
        if link.retiring and not link.in_flight:
            link.send(None)
        if self._changed:
            self._listener.changed()

    def _handle_welcome(self, welcome: wire.Welcome) -> None:
        link, model = self._link, welcome.model
        if welcome.epoch != link.epoch:
            raise Mismatch(
                f"worker {link.target} welcomed stream {welcome.epoch}, but this is stream {link.epoch}"
            )
        if model.tokenizer_fingerprint != link.fingerprint:
            raise Mismatch(
                f"worker {link.target} runs {model.name} with tokenizer {model.tokenizer_fingerprint}, but "
                f"this batcher has {link.fingerprint}: give both the same model"
            )
        if welcome.incarnation != link.incarnation:
            self._listener.cache_lost(link)
        link.incarnation = welcome.incarnation
        link.worker_id = welcome.worker_id
        link.model = model
        link.credit = welcome.credit
        link.problem = ""
        link.liveness.pong(0)
        link.connected = True
        log.info("worker connected", extra={"target": link.target, "worker": link.worker_id})

    def _handle_step(self, step: wire.Step, now: float) -> None:
        link = self._link
        link.liveness.stepped(now)
        self._changed = link.suspect
        link.suspect = False
        self._tokens, backlog = 0, link.in_flight.backlog
        vocabulary = link.model.vocabulary_size if link.model is not None else 0
        for delta in step.deltas:
            self._handle_delta(delta, vocabulary)
        if self._tokens:
            link.rate.add(now, self._tokens)
        self._changed |= link.in_flight.backlog != backlog
        self._listener.stepped(now)
        self._record_faults(now)
        if step.frame - self._acked >= _ACK_EVERY:
            self._acked = step.frame
            self._acknowledge()

    def _acknowledge(self) -> None:
        ack = wire.Ack(frame=self._acked, credit_generation=self._link.credit.generation)
        self._link.send(wire.RunRequest(ack=ack))

    def _handle_delta(self, delta: wire.SequenceDelta, vocabulary: int) -> None:
        link = self._link
        advanced = link.in_flight.advance(delta)
        if advanced is None:
            return
        sequence, ids, scores = advanced
        try:
            if sequence.prompt and not sequence.abandoned:
                self._take_prompt(sequence, delta, vocabulary)
            if ids:
                check_tokens(sequence, ids, scores, vocabulary=vocabulary)
                self._tokens += len(ids)
        except errors.SequenceFault as fault:
            self._fail(sequence.job, delta, fault)
            return
        if delta.HasField("cached_tokens"):
            self._listener.prefilled(link, sequence.job, delta.cached_tokens, used_cache=not sequence.prompt)
        finish = delta.finish
        ended = finish != pb.FINISH_REASON_UNSPECIFIED
        rejected = self._deliver(sequence, ids, scores, ended=ended) if ids else 0
        if rejected:
            self._listener.dropped(sequence.job, rejected)
        if delta.HasField("error"):
            self._end(delta.handle, delta.attempt, statuses.from_status(delta.error))
            return
        if ended and finish not in _FINISHES:
            raise errors.WorkerLost(f"the worker ended a sequence with {finish}, which is no reason")
        if not sequence.abandoned and (rejected or (not ended and sequence.job.inbox.full)):
            self._listener.inbox_full(link, sequence.job)
        if ended:
            self._end(delta.handle, delta.attempt, SequenceEnd(finish, delta.usage, delta.timing))

    @staticmethod
    def _take_prompt(sequence: InFlightSequence, delta: wire.SequenceDelta, vocabulary: int) -> None:
        """Hand the next part of the prompt to its job. All of it must come before the first token."""
        job = sequence.job
        if delta.HasField("prompt") and job.prompt_offset:
            for part in prompt_parts(
                delta.prompt,
                job.prompt_offset,
                prompt_tokens=len(job.prompt_ids),
                most=job.sampling.prompt_logprobs,
                vocabulary=vocabulary,
            ):
                job.add_prompt_part(part)
        complete = delta.finish in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
        if job.prompt_offset and (complete or delta.token_ids):
            raise errors.WorkerLost(
                f"the worker sent log-probabilities of {job.prompt_offset} of {len(job.prompt_ids)} prompt "
                "tokens before the first token of the answer"
            )

    def _fail(self, job: Job, delta: wire.SequenceDelta, fault: errors.SequenceFault) -> None:
        """Fail a sequence, whose *delta* is invalid, as its worker would: the others there continue."""
        if delta.HasField("error") or delta.finish:
            self._end(delta.handle, delta.attempt, fault)
            return
        self._faulted.append(job)
        self._link.cancel(job)
        self._listener.failed(self._link, job, fault)

    @staticmethod
    def _deliver(sequence: InFlightSequence, ids: list[int], scores: Sequence[Score], *, ended: bool) -> int:
        """Put tokens into the job's inbox. Returns how many it rejected; those are dropped.

        ended   whether the end of the answer follows: then the last tokens travel with it
        """
        job = sequence.job
        if not (ended or sequence.abandoned) and job.inbox.pass_on(ids, scores):
            job.generated += ids
            return 0
        accepted = 0 if sequence.abandoned else job.inbox.put(ids, scores)
        if rejected := len(ids) - accepted:
            job.history.wasted += rejected
            ids = ids[:accepted]
        job.generated += ids
        return rejected

    def _end(self, handle: int, attempt: int, end: SequenceEnd | errors.HeadraceError) -> None:
        """Remove a sequence that ended or failed at the worker, and report it unless it is abandoned."""
        link = self._link
        sequence = link.in_flight.remove(handle, attempt)
        if sequence is None:
            return
        self._changed = True
        if isinstance(end, errors.HeadraceError) and is_worker_fault(end):
            self._faulted.append(sequence.job)
        elif isinstance(end, SequenceEnd) and end.reason != pb.FINISH_REASON_CANCELLED:
            link.breaker.record_success()
        elif not sequence.abandoned:
            link.breaker.release_probe()  # rejected or handed back: neither a success nor a fault
        if sequence.abandoned:
            return
        if isinstance(end, SequenceEnd):
            self._listener.ended(link, sequence.job, end)
        else:
            self._listener.failed(link, sequence.job, end)

    def _record_faults(self, now: float) -> None:
        """Record the faults that one message reported as one: a single step may affect all sequences."""
        if self._faulted:
            faulted, self._faulted = self._faulted, []
            self._link.breaker.record_fault(now, request_keys(faulted))
