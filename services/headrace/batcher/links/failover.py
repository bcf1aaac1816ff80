"""Decide whether a job that failed at a worker gets another attempt.

Plain functions over the history of the job. The batcher hides worker failures from callers, within bounds:
another worker resumes the answer from the tokens that have arrived. A request that may be the cause of the
failures is not sent to one worker after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from headrace import errors
from headrace.batcher.job import Job

MAX_RESUMES = 2  # after the loss of a worker
MAX_SILENT_LOSSES = 2  # consecutive workers lost before they returned a token of the request
MAX_FAULT_RETRIES = 1


def is_worker_fault(error: errors.HeadraceError) -> bool:
    """Return whether *error* counts for the worker's circuit breaker."""
    return isinstance(error, errors.WorkerLost | errors.SequenceFault)


def request_keys(jobs: Iterable[Job]) -> frozenset[tuple[str, str]]:
    """Return the requests of *jobs* as circuit breakers identify them, over all attempts of each."""
    return frozenset((job.tenant, job.request_id) for job in jobs)


def check_retry(job: Job, error: errors.HeadraceError, alive: Collection[tuple[str, int]] = ()) -> None:
    """Record a failed attempt of the job. Returns if it should get another attempt, and raises otherwise.

    alive   addresses and incarnations of the ready workers: one that is back with the same incarnation was
            disconnected and did not die

    A worker that hands its work back because it drains does not count: a rolling restart may do so at every
    worker. Raises the error for the caller.
    """
    history = job.history
    history.reason = error.reason
    if isinstance(error, errors.WorkerDraining):
        return
    if isinstance(error, errors.SequenceFault):
        history.faults += 1
        if history.faults > MAX_FAULT_RETRIES:
            raise error
        return
    # A worker that rejects for lack of capacity counts like a lost one: try another, but not endlessly.
    if not isinstance(error, errors.Unavailable | errors.Overloaded):
        raise error
    history.losses += 1
    if isinstance(error, errors.WorkerLost):
        last = (history.address, history.incarnation)
        returned_tokens = job.answer_length > history.length_at_start
        dead = [worker for worker in history.killed if worker not in alive]
        history.killed = [] if returned_tokens else [*dead, last]
    if len(history.killed) >= MAX_SILENT_LOSSES:
        raise errors.PoisonRequest(
            f"{len(history.killed)} workers in a row were lost during the prefill of this request, so it is "
            "not sent to another one. If smaller requests work, report this one",
            attempts=job.attempt + 1,
        )
    if history.losses > MAX_RESUMES:
        raise errors.WorkerLost(
            f"{history.losses} workers were lost during this answer, the last one: {error.message}; "
            "continue with `resume`",
            attempts=job.attempt + 1,
        )


def avoided(job: Job) -> str:
    """Return the worker that failed the job last: it is chosen again only if there is no other."""
    history = job.history
    return history.address if history.reason not in ("", errors.SlowReader.reason) else ""


def failed_by(job: Job) -> str:
    """Return the worker whose engine failed the job last, if that is why it waits for another worker."""
    return job.history.address if job.history.reason == errors.SequenceFault.reason else ""


def on_probation(job: Job) -> bool:
    """Return whether the job may have killed its last worker.

    Such a job is sent to a worker that runs no other such job and has responded since the loss. If that
    worker dies as well, the cause is clear: neither another job, nor an event that killed all workers at
    once. Probation ends with the first token there.
    """
    return bool(job.history.killed) and job.answer_length == job.history.length_at_start
