"""Decide what becomes of a job whose attempt at a worker ended badly.

Plain functions over the job's history. A worker that fails is the batcher's to hide, within bounds: the
answer goes on elsewhere from the tokens that arrived. A request that may be what kills workers is not
carried from one to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from headrace import errors
from headrace.batcher.job import Job

RESUMES = 2  # after the loss of a worker
SILENT_LOSSES = 2  # in a row: workers lost before the request showed a token
FAULT_RETRIES = 1


def workers_fault(error: errors.HeadraceError) -> bool:
    """Whether *error* speaks against the worker: what opens its circuit breaker."""
    return isinstance(error, errors.WorkerLost | errors.SequenceFault)


def requests(jobs: Iterable[Job]) -> frozenset[tuple[str, str]]:
    """The requests of *jobs*, as circuit breakers tell them apart: over all attempts of each."""
    return frozenset((job.tenant, job.request_id) for job in jobs)


def carry_on(job: Job, error: errors.HeadraceError, alive: Collection[tuple[str, int]] = ()) -> None:
    """Book the end of the job's attempt; return if another one should follow.

    alive   addresses and incarnations of the workers that are ready: who is there again as the same process
            was cut off, and did not die

    A worker that hands its work back on stopping costs no try: a rolling restart may do so at every
    worker. Raises what the caller should hear if there is nothing more to be done.
    """
    history = job.history
    history.reason = error.reason
    if isinstance(error, errors.WorkerDraining):
        return
    if isinstance(error, errors.SequenceFault):
        history.faults += 1
        if history.faults > FAULT_RETRIES:
            raise error
        return
    # A worker that refuses for want of room is no better than a lost one: go elsewhere, but not for ever.
    if not isinstance(error, errors.Unavailable | errors.Overloaded):
        raise error
    history.losses += 1
    if isinstance(error, errors.WorkerLost):
        last = (history.address, history.incarnation)
        showed = job.answered > history.started_at
        history.killed = [] if showed else [*(one for one in history.killed if one not in alive), last]
    if len(history.killed) >= SILENT_LOSSES:
        raise errors.PoisonRequest(
            f"{len(history.killed)} workers in a row were lost while they took this request in; it is not "
            "given to another one. If smaller requests work, report this one",
            attempts=job.attempt + 1,
        )
    if history.losses > RESUMES:
        raise errors.WorkerLost(
            f"{history.losses} workers were lost during this answer, the last one: {error.message}; "
            "carry on with `resume`",
            attempts=job.attempt + 1,
        )


def avoided(job: Job) -> str:
    """The worker that the job should not go back to while there are others: the one that failed it last."""
    history = job.history
    return history.address if history.reason not in ("", errors.SlowReader.reason) else ""


def failed_by(job: Job) -> str:
    """The worker whose engine failed the job last, if that is why it waits: it is given to another one."""
    return job.history.address if job.history.reason == errors.SequenceFault.reason else ""


def on_probation(job: Job) -> bool:
    """Whether the job may be what its last worker died of.

    Such a job goes to a worker where no other is on probation, and that has been seen to live since: if that
    one dies as well, it is known of whom. No neighbour is taken for the culprit, nor what was there when all
    workers died at once. Its first token there ends it.
    """
    return bool(job.history.killed) and job.answered == job.history.started_at
