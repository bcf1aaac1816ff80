"""Carry one request through: try it at a batcher, carry it on at another, move it to another tier.

What survives a batcher's death lives here: the ids of the tokens that were passed on. With them, the seed
and the prompt another batcher goes on at the very next token. `on_tier` keeps a request on one tier,
`across_tiers` moves it while nothing of its answer has been said; which tier comes next is the caller's.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import aclosing, suppress

from opentelemetry import metrics, trace

from headrace import attributes, errors
from headrace.progress import Progress, Told, route_change
from headrace.router.answering import replies
from headrace.router.state.tiers import Batcher, Stalled, Tier
from headrace.v1 import generation_pb2 as pb

log = logging.getLogger(__name__)

FRUITLESS = 8  # hand-overs in a row, of batchers that drained, that brought no token
END_SECONDS = 1.0  # the longest that a finished answer waits for the end of its stream
LEAST_PAUSE = 0.05  # seconds between rounds of asking busy batchers, whatever they say
RESUMES = 2  # an answer that lost more batchers than this may be what kills them

# What a batcher says of itself, not of the request: another batcher may do better. WORKER_LOST is not among
# them: the batcher has tried its workers, and a request that kills each worker it meets must end somewhere.
_BATCHER_GONE = (errors.Unavailable, errors.BatcherLost, errors.Draining, errors.NotReady)
_TIER_BUSY = (errors.NoWorkers, errors.WorkerDraining, errors.Overloaded)

_failovers = metrics.get_meter("headrace.router").create_counter(
    attributes.METRIC_FAILOVERS, description="answers carried on elsewhere, by tier and reason"
)


async def across_tiers(
    choose: Callable[[Collection[str]], Tier],
    request: pb.GenerateRequest,
    *,
    ends: float,
    resume_seconds: float,
    returning: Callable[[Collection[str], float], Awaitable[bool]],
    asked: Callable[[str], None],
    hops: int = 0,
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Stream the answer of the tier that *choose* names, given the names of those that failed so far.

    request          with request_id and seed set
    ends             time.monotonic() of the deadline
    resume_seconds   as for `on_tier`
    asked            as for `on_tier`
    hops             as for `on_tier`
    returning        asked when no tier is left: whether it is worth choosing anew (`Tiers.returning`)

    A tier that cannot serve, would not now, or has too short a context, is replaced as long as the caller has
    heard nothing; a request that resumes stays, for its token ids are those of one model. Raises what
    `choose` raises at first, and what the last tier said when it finds no other.
    """
    began = time.monotonic()
    failed: list[str] = []
    said: errors.HeadraceError | None = None
    while True:
        try:
            tier = choose(failed)
        except errors.NoWorkers as nobody:
            if (said is None or _may_pass(said)) and await returning(failed, began):
                failed.clear()
                continue
            raise said or nobody from None
        accepted = False
        try:
            answer = on_tier(tier, request, ends=ends, resume_seconds=resume_seconds, asked=asked, hops=hops)
            async with aclosing(answer) as responses:
                async for response in responses:
                    first, accepted = not accepted, True
                    yield response
                    if first and failed and request.stream.include_route_changes:
                        yield route_change(failed[-1], tier.name, said.reason if said else "", len(failed))
            return
        except errors.WorkerLost:
            raise  # another tier could lose its workers, too
        except (errors.Unavailable, errors.Overloaded) as error:
            if accepted or request.resume.token_ids:
                raise
            failed.append(tier.name)
            said = error
        except errors.ContextTooLong as error:
            if accepted or request.resume.token_ids:
                raise
            failed.append(tier.name)
            said = said or error  # what may pass is the better advice


def _may_pass(error: errors.HeadraceError) -> bool:
    """Whether a tier that said this may take the same request in a moment: it told of itself, not of load."""
    return isinstance(error, errors.NoWorkers) or type(error) in _BATCHER_GONE


async def on_tier(
    tier: Tier,
    request: pb.GenerateRequest,
    *,
    ends: float,
    resume_seconds: float,
    asked: Callable[[str], None],
    hops: int = 0,
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Stream one answer from the batchers of *tier*: whole, whatever becomes of up to two of them.

    request          with request_id and seed set
    ends             time.monotonic() of the deadline
    resume_seconds   how long an answer that lost its batcher waits for another one
    asked            told the tier's name whenever one of its batchers is asked
    hops             routers that the request has passed before this one

    Before the first event every batcher of the tier is asked once. Raises NoWorkers or Overloaded when none
    takes the request, BatcherLost when an answer could not be carried on, and whatever else a batcher says
    of the request.
    """
    answer = _Answer(request, tier.name)
    refused: dict[Batcher, errors.HeadraceError] = {}
    patience = 0.0  # time.monotonic() until which an answer under way looks for a batcher
    while True:
        batcher = await _next(tier, refused, patience if answer.accepted else None)
        if batcher is None:
            raise _nobody(tier, refused, answer.lost)
        answer.goes_to(batcher)
        asked(tier.name)
        error: errors.HeadraceError
        try:
            labels: dict[str, str | int] = {
                attributes.TIER: tier.name,
                attributes.BATCHER: batcher.address,
                attributes.ATTEMPT: answer.attempt,
            }
            left = max(ends - time.monotonic(), 0.0)
            stream = batcher.generate(answer.request(), timeout=left, hops=hops, **labels)
            async with aclosing(stream) as responses:
                async for response in responses:
                    for told in answer.take(response):
                        yield told
                    if answer.finished:
                        # Its status is read for the span's sake; events after the last one are nobody's.
                        with suppress(TimeoutError, Stalled, errors.HeadraceError):
                            async with asyncio.timeout(END_SECONDS):
                                await anext(responses, None)
                        break
            error = errors.BatcherLost(f"the batcher at {batcher.address} ended the stream without a finish")
        except Stalled as stalled:
            error = errors.BatcherLost(str(stalled))
        except (errors.Unavailable, errors.Overloaded) as said:
            error = said
        except (errors.UnknownModel, errors.UnknownTier) as unknown:
            if answer.lost is None:
                raise
            # The peer does not serve the model that began: for the caller nobody does, here.
            error = errors.NoWorkers(str(unknown))
        except errors.RequestCancelled as cancelled:
            # Not by us, or this would be a CancelledError: the batcher was stopped, or something between.
            error = errors.BatcherLost(f"the batcher at {batcher.address} cancelled the answer: {cancelled}")
        except errors.Foreign as answered:
            # It is the router, and not its caller, whom something on the way does not let through.
            error = errors.BatcherLost(
                f"a proxy or another service answered for the batcher at {batcher.address}: {answered} "
                f"[{answered.reason}]"
            )
        if answer.finished:
            return  # whatever became of the stream after its last event
        if not answer.taken:
            # It refused, and nothing was lost by asking.
            refused[batcher] = error
            if type(error) in _BATCHER_GONE:
                batcher.doubt()
            elif not isinstance(error, _TIER_BUSY):
                raise error
            continue
        if type(error) not in _BATCHER_GONE:
            raise error
        batcher.doubt()
        refused.clear()
        answer.lose(error if type(error) is not errors.Unavailable else errors.BatcherLost(error.message))
        if answer.losses > RESUMES or answer.fruitless > FRUITLESS:
            raise errors.BatcherLost(
                f"tier {tier.name!r} lost {answer.attempts} batchers with this answer; the last: {error}"
            ) from error
        patience = min(time.monotonic() + resume_seconds, ends)
        log.info("answer lost its batcher", extra={"tier": tier.name, "batcher": batcher.address})


async def _next(
    tier: Tier, refused: dict[Batcher, errors.HeadraceError], patience: float | None
) -> Batcher | None:
    """The batcher to ask next, None if there is none.

    patience   an answer under way is worth waiting for, until this; None asks each batcher once
    """
    if patience is None:
        if (batcher := tier.pick(refused)) is None:
            await tier.settle()
            batcher = tier.pick(refused)
        return batcher
    while (left := patience - time.monotonic()) > 0:
        if not refused:
            return await tier.picked((), left)
        if (batcher := tier.pick(refused)) is not None:
            return batcher
        # All are busy: ask again when they said, a little apart from the others that were lost with us.
        delays = [error.retry_after for error in refused.values() if error.retry_after is not None]
        pause = max(min(delays, default=0.2), LEAST_PAUSE)
        await asyncio.sleep(min(pause * random.uniform(0.5, 1), left))
        refused.clear()
    return None


def _nobody(
    tier: Tier, refused: dict[Batcher, errors.HeadraceError], lost: errors.HeadraceError | None
) -> errors.HeadraceError:
    """What to say when no batcher is left to ask."""
    if lost is not None:
        return errors.BatcherLost(
            f"the batcher of tier {tier.name!r} was lost in mid-answer ({lost}) and no other carries on; "
            "try again",
            retry_after=1.0,
        )
    said = list(refused.values())
    # Busy beats gone: its delay is the better advice.
    for error in said:
        if isinstance(error, errors.Overloaded):
            return error
    for error in said:
        if type(error) is not errors.Unavailable:
            return error
    problem = "cannot be reached" if said else f"cannot serve ({tier.seen.unhealthy_reason})"
    return errors.NoWorkers(
        f"the batcher of tier {tier.name!r} {problem}; try again shortly", retry_after=1.0
    )


class _Answer(Progress):
    """What the caller has of an answer, and what it took: all that the next batcher needs.

    Each event is checked and brought into the router's own terms when it is taken.

    tier     the router's name of the tier that answers
    taken    whether the batcher of this attempt has taken it
    lost     why the answer left the batcher before, if it did
    losses   batchers that were lost with it; one that drained is not held against the answer
    attempts   that were lost, for whatever reason
    fruitless  of these, the last ones in a row that brought no token
    """

    def __init__(self, request: pb.GenerateRequest, tier: str) -> None:
        super().__init__(request)
        self._tier = tier
        self._at_router = False  # this attempt's peer is a router itself
        self.taken = False
        self.lost: errors.HeadraceError | None = None
        self.losses = 0
        self.attempts = 0
        self.fruitless = 0
        self._had = 0  # tokens when this attempt began
        self._tells_moves = request.stream.include_route_changes
        self._place = self._last_place = ""
        self._replayed_before = 0  # by attempts that were lost
        self._replayed = 0  # by this one
        self._began = time.monotonic()
        self._first_token: float | None = None
        self._last_token = 0.0

    def request(self) -> pb.GenerateRequest:
        """What to ask the next batcher for."""
        request = super().request()
        request.stream.include_route_changes = True
        # Tiers are chosen here, and have other names there.
        for field in ("tier", "min_tier", "max_tier"):
            request.routing.ClearField(field)
        if self._at_router and self.accepted is not None:
            request.routing.model = self.accepted.model  # which began, and alone can carry on
        return request

    def goes_to(self, batcher: Batcher) -> None:
        """The next attempt is at *batcher*."""
        self._place = batcher.address
        self._had = len(self.ids)
        self._at_router = batcher.router
        self._replayed = len(self.ids)

    def take(self, response: pb.GenerateResponse) -> Told:
        """What the caller hears of this event.

        Raises as `Progress` does, and BatcherLost for an event that the contract does not allow here.
        """
        event = response.WhichOneof("event")
        if (event == "accepted") == self.taken:
            raise errors.BatcherLost(
                "the batcher accepted the request twice"
                if self.taken
                else f"the batcher began its answer with {event or 'nothing'}, not with `accepted`"
            )
        if event == "delta":
            if self._ending is not None:
                raise errors.BatcherLost("the batcher went on after the end of the answer's text")
            replies.check_delta(response.delta, len(self.ids), self._asked)
            if response.delta.token_count:
                self._last_token = time.monotonic()
                self._first_token = self._first_token or self._last_token
            return self.add(response)
        if event == "accepted":
            return self._accept(response)
        if event == "route_change":
            replies.check_change(response.route_change, self._tier if self._at_router else "")
            self.attempt = max(self.attempt, response.route_change.attempt)
            self._replayed += len(self.ids)
            return (response,) if self._tells_moves else ()
        if event == "finish":
            replies.check_finish(response.finish, len(self.ids))
            self._settle(response.finish)
            return self.finish(response)
        return (response,)  # an event that a newer batcher knows and we do not is the caller's to ignore

    def lose(self, why: errors.HeadraceError) -> None:
        """The batcher of this attempt is gone."""
        self.broke()
        self.lost = why
        self.losses += not isinstance(why, errors.Draining)
        self.attempts += 1
        self.fruitless = 0 if len(self.ids) > self._had else self.fruitless + 1
        self.taken = False
        self._last_place = self._place
        self._replayed_before += self._replayed

    def _accept(self, response: pb.GenerateResponse) -> Told:
        replies.accept(response.accepted, self._asked, self._tier)
        first = self.accept(response.accepted)
        self.taken = True
        if first or self.lost is None:
            return (response,)
        reason = self.lost.reason
        _failovers.add(1, {attributes.TIER: self._tier, attributes.REASON: reason})
        trace.get_current_span().add_event(
            attributes.EVENT_FAILOVER, {attributes.REASON: reason, attributes.BATCHER: self._place}
        )
        if not self._tells_moves:
            return ()
        return (route_change(self._last_place, self._place, reason, self.attempt),)

    def _settle(self, finish: pb.Finish) -> None:
        """Bill and clock the whole answer, of which the last batcher knows its own part."""
        if self.lost is None:
            return
        finish.usage.replayed_tokens = replies.total([finish.usage.replayed_tokens, self._replayed_before])
        timing = finish.timing
        timing.total.FromNanoseconds(int((time.monotonic() - self._began) * 1e9))
        if self._first_token is not None:
            timing.first_token.FromNanoseconds(int((self._first_token - self._began) * 1e9))
            timing.decode.FromNanoseconds(int((self._last_token - self._first_token) * 1e9))
