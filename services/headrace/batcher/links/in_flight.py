"""Keep the books of one stream to a worker: which handle stands for which job, and how far it has come.

This is where fencing happens: a delta counts only for the handle and the attempt that it was made for,
and only from the offset on that is expected. Plain data; a new stream begins with new books.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from headrace import errors
from headrace.batcher.job import Job
from headrace.v1 import worker_service_pb2 as wire


@dataclass(slots=True)
class Flight:
    """A job at the worker.

    attempt     of the job, when it was sent
    offset      of the next token
    taken_in    whether a token was seen, so that its prompt is computed
    abandoned   nobody waits for it here; it stays until the worker's last word, which frees the handle
    """

    job: Job
    attempt: int
    offset: int
    cost: int
    taken_in: bool = False
    abandoned: bool = False


class Flights:
    """The jobs at one worker."""

    def __init__(self) -> None:
        self._flights: dict[int, Flight] = {}
        self._handles: dict[Job, int] = {}
        self._free: list[int] = []  # lowest first: handles stay small, and short on the wire
        self.backlog = 0  # tokens to compute of those whose first token is still to come

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, job: Job) -> bool:
        return job in self._handles

    def jobs(self) -> list[Job]:
        """The jobs that somebody waits for."""
        return list(self._handles)

    def handle(self, job: Job) -> int | None:
        """The handle of a job that somebody waits for."""
        return self._handles.get(job)

    def flight(self, handle: int) -> Flight | None:
        """Who stands behind *handle*."""
        return self._flights.get(handle)

    def board(self, job: Job) -> int:
        """Take a job in, as it stands now; returns its handle."""
        handle = heapq.heappop(self._free) if self._free else len(self._flights)
        self._flights[handle] = Flight(job, job.attempt, job.answered, job.uncached)
        self._handles[job] = handle
        self.backlog += job.uncached
        return handle

    def abandon(self, job: Job) -> int | None:
        """Nobody waits for the job here any more; returns the handle to cancel, None if it is not here."""
        handle = self._handles.pop(job, None)
        if handle is not None:
            self._flights[handle].abandoned = True
        return handle

    def arrive(self, delta: wire.SequenceDelta) -> tuple[Flight, list[int], list[float]] | None:
        """What of *delta* is new: the flight, ids and logprobs. None if it does not count.

        Raises WorkerLost if tokens are missing before it.
        """
        flight = self._flights.get(delta.handle)
        if flight is None or delta.attempt != flight.attempt:
            return None  # of a sequence that is over
        skip = flight.offset - delta.offset
        if skip < 0:
            raise errors.WorkerLost(
                f"the worker skipped tokens: offset {delta.offset}, expected {flight.offset}"
            )
        ids, logprobs = list(delta.token_ids[skip:]), list(delta.logprobs[skip:])
        flight.offset += len(ids)
        if ids:
            self._take_in(flight)
        return flight, ids, logprobs

    def land(self, handle: int, attempt: int) -> Flight | None:
        """The worker's last word on a sequence: its handle is free. None if it does not count."""
        flight = self._flights.get(handle)
        if flight is None or flight.attempt != attempt:
            return None
        del self._flights[handle]
        heapq.heappush(self._free, handle)
        self._take_in(flight)
        if not flight.abandoned:
            del self._handles[flight.job]
        return flight

    def _take_in(self, flight: Flight) -> None:
        if not flight.taken_in:
            flight.taken_in = True
            self.backlog -= flight.cost


def check_tokens(flight: Flight, ids: Sequence[int], logprobs: Sequence[float], *, vocabulary: int) -> None:
    """Raise WorkerLost for tokens of *flight* that its worker cannot have made; *vocabulary* 0 is unknown."""
    sampling = flight.job.sampling
    if flight.offset > sampling.max_tokens:
        raise errors.WorkerLost(
            f"the worker sent {flight.offset} tokens of an answer of at most {sampling.max_tokens}"
        )
    if vocabulary and max(ids) >= vocabulary:
        raise errors.WorkerLost(f"the worker sent token {max(ids)}, though its vocabulary has {vocabulary}")
    if sampling.logprobs and len(logprobs) != len(ids):
        raise errors.WorkerLost(f"the worker sent {len(logprobs)} log-probabilities for {len(ids)} tokens")
