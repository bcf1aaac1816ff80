"""Account for the sequences at one worker: their handles, jobs and offsets.

Fencing happens here: a delta counts only for the handle and the attempt it was made for, and only from the
expected offset. Plain data; every new stream starts with an empty account.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from headrace import errors
from headrace.batcher.job import Job
from headrace.batcher.token_details import Score, check_scores, scores_of
from headrace.v1 import worker_service_pb2 as wire


@dataclass(slots=True)
class InFlightSequence:
    """A job at the worker.

    attempt     the attempt of the job that was sent
    offset      of the next token
    cost        tokens to compute for the first token
    max_tokens  of the job's sampling
    logprobs    whether the job wants a log-probability per token
    top         of how many most likely tokens, too
    prompt      whether the worker sends the log-probabilities of the prompt first; it then computes all of it
    prefilled   whether a token has arrived, so the prompt is computed
    abandoned   the job was cancelled here; the entry stays until the worker confirms, which frees the handle
    """

    job: Job
    attempt: int
    offset: int
    cost: int
    max_tokens: int
    logprobs: bool
    top: int = 0
    prompt: bool = False
    prefilled: bool = False
    abandoned: bool = False


class InFlightSequences:
    """The sequences at one worker.

    backlog   tokens to compute for the sequences that have no token yet
    """

    def __init__(self) -> None:
        self._sequences: dict[int, InFlightSequence] = {}
        self._handles: dict[Job, int] = {}
        self._free: list[int] = []  # lowest first: handles stay small, and short on the wire
        self.backlog = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, job: Job) -> bool:
        return job in self._handles

    def jobs(self) -> list[Job]:
        """Return the jobs that are not abandoned."""
        return list(self._handles)

    def handle(self, job: Job) -> int | None:
        """Return the handle of a job that is not abandoned."""
        return self._handles.get(job)

    def add(self, job: Job) -> int:
        """Add a job in its current state. Returns its handle."""
        handle = heapq.heappop(self._free) if self._free else len(self._sequences)
        sampling = job.sampling
        self._sequences[handle] = InFlightSequence(
            job,
            job.attempt,
            job.answer_length,
            job.uncached,
            sampling.max_tokens,
            sampling.logprobs,
            sampling.top_logprobs,
            bool(job.prompt_offset),
        )
        self._handles[job] = handle
        self.backlog += job.uncached
        return handle

    def abandon(self, job: Job) -> int | None:
        """Mark a job as abandoned. Returns the handle to cancel, None if it is not here."""
        handle = self._handles.pop(job, None)
        if handle is not None:
            self._sequences[handle].abandoned = True
        return handle

    def advance(
        self, delta: wire.SequenceDelta
    ) -> tuple[InFlightSequence, list[int], Sequence[Score]] | None:
        """Return the sequence, the new ids and their scores of *delta*; None if the delta does not count.

        Raises WorkerLost if tokens before it are missing, or `top` has the wrong length.
        """
        sequence = self._sequences.get(delta.handle)
        if sequence is None or delta.attempt != sequence.attempt:
            return None  # of a sequence that has ended
        skip = sequence.offset - delta.offset
        if skip < 0:
            raise errors.WorkerLost(
                f"the worker skipped tokens: offset {delta.offset}, expected {sequence.offset}"
            )
        ids = delta.token_ids[skip:]
        if ids:
            sequence.offset += len(ids)
            self._mark_prefilled(sequence)
        if not sequence.logprobs:
            return sequence, ids, []
        return sequence, ids, scores_of(delta, skip) if sequence.top else delta.logprobs[skip:]

    def remove(self, handle: int, attempt: int) -> InFlightSequence | None:
        """Remove a sequence that ended at the worker, and free its handle. None if the end does not count."""
        sequence = self._sequences.get(handle)
        if sequence is None or sequence.attempt != attempt:
            return None
        del self._sequences[handle]
        heapq.heappush(self._free, handle)
        self._mark_prefilled(sequence)
        if not sequence.abandoned:
            del self._handles[sequence.job]
        return sequence

    def _mark_prefilled(self, sequence: InFlightSequence) -> None:
        if not sequence.prefilled:
            sequence.prefilled = True
            self.backlog -= sequence.cost


def check_tokens(
    sequence: InFlightSequence, ids: Sequence[int], scores: Sequence[Score], *, vocabulary: int
) -> None:
    """Raise WorkerLost for tokens that the worker cannot have generated, or as `check_scores` does.

    vocabulary   the size of its vocabulary; 0 while unknown
    """
    if sequence.offset > sequence.max_tokens:
        raise errors.WorkerLost(
            f"the worker sent {sequence.offset} tokens of an answer of at most {sequence.max_tokens}"
        )
    if vocabulary and max(ids) >= vocabulary:
        raise errors.WorkerLost(f"the worker sent token {max(ids)}, but its vocabulary has {vocabulary}")
    if sequence.logprobs:
        if len(scores) != len(ids):
            raise errors.WorkerLost(f"the worker sent {len(scores)} log-probabilities for {len(ids)} tokens")
        if not sequence.abandoned:
            check_scores(scores, most=sequence.top, vocabulary=vocabulary)
