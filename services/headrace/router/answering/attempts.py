"""Forward one request: attempt it at a batcher, resume it on another, move it to another tier.

The router keeps the token ids that it has forwarded. With them, the seed and the prompt, another batcher
resumes at the next token. An answer of text alone has no ids: once a part of it was forwarded, it ends when
its batcher is lost. `on_tier` keeps a request on one tier; `across_tiers` moves it to another tier while the
caller has received nothing. `Routed` chooses the tiers.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Protocol, TypeGuard

from headrace import attributes, errors
from headrace.deadline import Deadline
from headrace.flushing import Flusher
from headrace.multiplex.call import Take
from headrace.progress import route_change
from headrace.router.answering.forwarded_answer import ForwardedAnswer
from headrace.router.state.batcher_peer import BatcherPeer, Stalled
from headrace.router.state.tiers import Tier
from headrace.v1 import generation_pb2 as pb

log = logging.getLogger(__name__)

MAX_FRUITLESS = 8  # attempts in a row, at batchers that drained, that brought no token
END_SECONDS = 1.0  # the longest that a finished answer waits for the end of its stream
MIN_PAUSE = 0.05  # seconds between rounds of attempts at busy batchers, whatever delay they advise
MAX_LOSSES = 2  # an answer that lost more batchers than this may be the cause

# Errors about the batcher and not about the request: another batcher may succeed. WORKER_LOST is not among
# them: the batcher has tried its workers, and a request that kills each of its workers must end.
_BATCHER_GONE = (errors.Unavailable, errors.BatcherLost, errors.Draining, errors.NotReady)
_TIER_BUSY = (errors.NoWorkers, errors.WorkerDraining, errors.Overloaded, errors.UpstreamLost)


class Direct(Protocol):
    """A way to the caller for events that need not wait: past the generators, which are slow."""

    @property
    def ready(self) -> bool:
        """Whether an event can be delivered."""
        ...

    def deliver(self, response: pb.GenerateResponse) -> None:
        """Deliver an event to the caller, while `ready`."""
        ...


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request as the router sends it to batchers.

    request            with request_id and seed set
    deadline           of the whole answer
    failover_seconds   how long an answer that lost its batcher waits for another one
    hops               routers that the request has passed before this one
    flusher            when tokens that are gathered for the caller are sent; None: none are gathered
    direct             for deltas that arrive while the reader of the answer waits; None: all go by the reader
    """

    request: pb.GenerateRequest
    deadline: Deadline
    failover_seconds: float
    hops: int = 0
    flusher: Flusher | None = None
    direct: Direct | None = None


class Counted(Protocol):
    """A request whose attempts at batchers are counted."""

    def count_attempt(self, tier: str) -> None:
        """Count an attempt at a batcher of *tier*."""
        ...


class Routed(Counted, Protocol):
    """A request that is being routed."""

    outgoing: Outgoing

    def choose(self, rejected: Sequence[str], failed: Collection[str]) -> Tier:
        """Choose the next tier: larger than those whose drafts were *rejected*, and not one that *failed*.

        Raises NoWorkers if no tier is left, and the errors of invalid hints.
        """
        ...

    def drop_logprobs(self, error: errors.InvalidRequest) -> bool:
        """Leave out log-probabilities that only the router wants, if *error* rejects them; return whether."""
        ...

    async def wait_for_recovery(self, failed: Collection[str], began: float) -> bool:
        """See `Tiers.wait_for_recovery`."""
        ...


def clear_details(sampling: pb.Sampling) -> None:
    """Ask for no log-probabilities, in a request whose answer nobody receives."""
    for field in ("logprobs", "top_logprobs", "prompt_logprobs"):
        sampling.ClearField(field)


async def across_tiers(
    routed: Routed, rejected: Sequence[str] = ()
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Stream an answer by the first tier that accepts the request.

    rejected   tiers whose drafts were rejected: only larger tiers are tried

    A tier that cannot serve, is busy, has too short a context or lacks a feature is replaced by another tier
    until the caller has received an event. A request that resumes stays on its tier, because its token ids
    belong to one model. Raises the first error of `Routed.choose`, and the error of the last tier if none is
    left.
    """
    began = time.monotonic()
    request = routed.outgoing.request
    failed: list[str] = []
    last: errors.HeadraceError | None = None
    while True:
        try:
            tier = routed.choose(rejected, failed)
        except errors.NoWorkers as none_left:
            if (last is None or _may_recover(last)) and await routed.wait_for_recovery(failed, began):
                failed.clear()
                continue
            raise last or none_left from None
        accepted = False
        try:
            async with aclosing(on_tier(tier, routed, routed.outgoing)) as responses:
                async for response in responses:
                    first, accepted = not accepted, True
                    yield response
                    if first and failed and request.stream.include_route_changes:
                        yield route_change(failed[-1], tier.name, last.reason if last else "", len(failed))
            return
        except errors.WorkerLost:
            raise  # another tier could lose its workers to the same request
        except (errors.Unavailable, errors.Overloaded, errors.InvalidRequest) as error:
            unfit = isinstance(error, errors.InvalidRequest)
            if not accepted and isinstance(error, errors.InvalidRequest) and routed.drop_logprobs(error):
                continue
            if accepted or request.resume.token_ids or (unfit and not _is_the_tiers(error)):
                raise
            failed.append(tier.name)
            if last is None or not unfit:
                last = error  # an error that may pass is the better advice


def _is_the_tiers(error: errors.HeadraceError) -> bool:
    """Whether another tier may accept a request that this one finds invalid."""
    return isinstance(error, errors.ContextTooLong) or _lacks_feature(error)


def _lacks_feature(error: Exception) -> TypeGuard[errors.InvalidRequest]:
    """Whether a batcher's workers lack a feature: those of another one, even of its tier, may have it."""
    return isinstance(error, errors.InvalidRequest) and errors.FEATURE in error.fields


def _may_recover(error: errors.HeadraceError) -> bool:
    """Whether a tier that failed with this may soon accept the request: it was down, not busy."""
    return isinstance(error, errors.NoWorkers) or type(error) in _BATCHER_GONE


async def on_tier(
    tier: Tier, routed: Counted, outgoing: Outgoing
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Stream one answer from the batchers of *tier*. It survives the loss of up to two of them.

    Before the first event, every batcher of the tier is tried once. Raises NoWorkers or Overloaded if none
    accepts the request, InvalidRequest if they lack a feature, BatcherLost if an answer could not be resumed,
    UpstreamLost if one of text alone broke off, and the batchers' errors about the request.
    """
    answer = ForwardedAnswer(outgoing.request, tier.name)
    refused: dict[BatcherPeer, errors.HeadraceError] = {}
    resume_until: Deadline | None = None  # once the answer has begun and lost its batcher
    while (batcher := await next_batcher(tier, refused, resume_until)) is not None:
        answer.begin_attempt(batcher)
        routed.count_attempt(tier.name)
        try:
            labels: dict[str, str | int] = {
                attributes.TIER: tier.name,
                attributes.ATTEMPT: answer.attempt,
            }
            stream = batcher.generate(
                answer.request(),
                deadline=outgoing.deadline,
                hops=outgoing.hops,
                flusher=outgoing.flusher,
                take=None if outgoing.direct is None else _taking(answer, batcher, outgoing.direct),
                **labels,
            )
            async with aclosing(stream) as responses:
                async for response in responses:
                    for event in answer.take(response):
                        yield event
                    if answer.finished:
                        # The status ends the call's span. Errors and events after the last one do not count.
                        with suppress(TimeoutError, Stalled, errors.HeadraceError):
                            async with asyncio.timeout(END_SECONDS):
                                await anext(responses, None)
                        return
            error: errors.HeadraceError = errors.BatcherLost(
                f"the batcher at {batcher.address} ended the stream without a finish"
            )
        except (Stalled, errors.HeadraceError) as raised:
            error = batcher_error(raised, batcher, resuming=answer.lost is not None)
        if answer.finished:
            return
        if not answer.accepted_here:
            _record_refusal(refused, batcher, error)
            continue
        _record_loss(answer, tier, batcher, error)
        refused.clear()
        resume_until = min(Deadline(time.monotonic() + outgoing.failover_seconds), outgoing.deadline)
    raise none_left(tier, refused, answer.lost)


def _taking(answer: ForwardedAnswer, batcher: BatcherPeer, direct: Direct) -> Take:
    """Return a function that takes a delta of *batcher* and delivers it directly, if it can."""

    def take(response: pb.GenerateResponse) -> bool:
        if not direct.ready:
            return False
        try:
            events = answer.take(response)
        except errors.HeadraceError:
            return False  # the reader gets it, and the same error
        batcher.last_message = time.monotonic()
        for event in events:
            direct.deliver(event)
        return True

    return take


def batcher_error(raised: Exception, batcher: BatcherPeer, *, resuming: bool = False) -> errors.HeadraceError:
    """Return the error of a batcher that another batcher may not have; raise one that is the request's."""
    if isinstance(raised, errors.Unavailable | errors.Overloaded) or _lacks_feature(raised):
        return raised
    if isinstance(raised, Stalled):
        return errors.BatcherLost(str(raised))
    if isinstance(raised, errors.UnknownModel | errors.UnknownTier) and resuming:
        # The peer does not serve the model that began. For the caller, no batcher here does.
        return errors.NoWorkers(str(raised))
    if isinstance(raised, errors.RequestCancelled):
        # The router did not cancel it, or this would be a CancelledError: the batcher or a proxy was stopped.
        return errors.BatcherLost(f"the batcher at {batcher.address} cancelled the answer: {raised}")
    if isinstance(raised, errors.Foreign):
        # A proxy rejected the router, not the router's caller.
        return errors.BatcherLost(
            f"a proxy or another service answered for the batcher at {batcher.address}: {raised} "
            f"[{raised.reason}]"
        )
    raise raised


def _record_refusal(
    refused: dict[BatcherPeer, errors.HeadraceError], batcher: BatcherPeer, error: errors.HeadraceError
) -> None:
    """Record that a batcher did not accept the request. Raises *error* if no other batcher would."""
    refused[batcher] = error
    if type(error) in _BATCHER_GONE:
        batcher.mark_suspect()
    elif not (isinstance(error, _TIER_BUSY) or _lacks_feature(error)):
        raise error


def _record_loss(
    answer: ForwardedAnswer, tier: Tier, batcher: BatcherPeer, error: errors.HeadraceError
) -> None:
    """Record that an answer lost its batcher. Raises if it may not resume."""
    if type(error) not in _BATCHER_GONE:
        raise error
    batcher.mark_suspect()
    lost = error if type(error) is not errors.Unavailable else errors.BatcherLost(error.message)
    if not answer.resumable:
        raise answer.broken_off(lost) from error
    answer.lose(lost)
    if answer.losses > MAX_LOSSES or answer.fruitless > MAX_FRUITLESS:
        raise errors.BatcherLost(
            f"tier {tier.name!r} lost {answer.attempts} batchers with this answer; the last: {error}"
        ) from error
    log.info("answer lost its batcher", extra={"tier": tier.name, "batcher": batcher.address})


async def next_batcher(
    tier: Tier, refused: dict[BatcherPeer, errors.HeadraceError], resume_until: Deadline | None = None
) -> BatcherPeer | None:
    """Return the batcher for the next attempt; None if there is none.

    resume_until   how long an answer that has begun waits for a batcher; None: each batcher is tried once
    """
    if resume_until is None:
        if (batcher := tier.pick(refused)) is None:
            await tier.settle()
            batcher = tier.pick(refused)
        return batcher
    while (left := resume_until.left(time.monotonic())) > 0:
        if not refused:
            return await tier.wait_for_batcher(resume_until)
        if (batcher := tier.pick(refused)) is not None:
            return batcher
        # All are busy: try again after the delay that they advise, with jitter, because other answers lost
        # the same batcher.
        delays = [error.retry_after for error in refused.values() if error.retry_after is not None]
        pause = max(min(delays, default=0.2), MIN_PAUSE)
        await asyncio.sleep(min(pause * random.uniform(0.5, 1), left))
        refused.clear()
    return None


def none_left(
    tier: Tier, refused: dict[BatcherPeer, errors.HeadraceError], lost: errors.HeadraceError | None = None
) -> errors.HeadraceError:
    """Return the error for the caller if no batcher is left to try."""
    if lost is not None:
        return errors.BatcherLost(
            f"the batcher of tier {tier.name!r} was lost during the answer ({lost}) and no other resumed it; "
            "try again",
            retry_after=1.0,
        )
    refusals = list(refused.values())
    # A busy batcher is reported before one that is down: its delay is the better advice.
    for error in refusals:
        if isinstance(error, errors.Overloaded):
            return error
    # Then an error that may pass, before one that does not.
    for error in sorted(refusals, key=_lacks_feature):
        if type(error) is not errors.Unavailable:
            return error
    problem = "cannot be reached" if refusals else f"cannot serve ({tier.reported.unhealthy_reason})"
    return errors.NoWorkers(
        f"the batcher of tier {tier.name!r} {problem}; try again shortly", retry_after=1.0
    )
