"""Any reply of a batcher leaves the router running, and its bills correct."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import errors
from headrace.router.state.peer_reports import BadReply, read_tiers
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from tests.harness import PATIENCE, collect, prompt
from tests.router.fake_batchers import FakeBatcher, routed
from tests.router.rogue import ACCEPTED, FINISH, InvalidBatcher, delta, event

COUNTS = st.sampled_from([0, 1, 2, 2**31, 2**32 - 1])
NAMES = st.sampled_from(["", "only", "spare", "small", "x" * 400, "\u0000"])
NUMBERS = st.sampled_from([0.0, -1.0, math.nan, math.inf, -math.inf, 1e300])
SECONDS = st.sampled_from([0, 1, -1, 2**62, -(2**62)])


@st.composite
def timings(draw: st.DrawFn) -> pb.Timing:
    timing = pb.Timing()
    timing.first_token.seconds, timing.decode.seconds = draw(SECONDS), draw(SECONDS)
    timing.total.nanos = draw(st.sampled_from([0, -1, 2**31 - 1]))
    return timing


EVENTS = st.one_of(
    st.just(ACCEPTED),
    st.just(FINISH),
    st.just(event()),
    st.builds(delta, st.integers(0, 3)),
    st.builds(
        lambda offset, count, ids, logprobs: event(
            delta=pb.Delta(offset=offset, token_count=count, token_ids=ids, text="t", logprobs=logprobs)
        ),
        COUNTS,
        COUNTS,
        st.lists(COUNTS, max_size=2),
        st.lists(NUMBERS, max_size=2),
    ),
    st.builds(
        lambda model, tier, tokens, score: event(
            accepted=pb.Accepted(model=model, tier=tier, prompt_tokens=tokens, score=score)
        ),
        NAMES,
        NAMES,
        COUNTS,
        NUMBERS,
    ),
    st.builds(
        lambda to, reason, attempt: event(route_change=pb.RouteChange(to=to, reason=reason, attempt=attempt)),
        NAMES,
        NAMES,
        COUNTS,
    ),
    st.builds(
        lambda reason, tokens, tier, timing: event(
            finish=pb.Finish(
                reason=reason,
                usage=pb.Usage(prompt_tokens=tokens, completion_tokens=tokens, wasted_tokens=tokens),
                bill=pb.Bill(charges=[pb.Charge(tier=tier, prompt_tokens=tokens)], cost=math.nan),
                timing=timing,
            )
        ),
        st.integers(0, 9),  # unknown ones, too, as a newer batcher may send
        COUNTS,
        NAMES,
        timings(),
    ),
)


@settings(max_examples=25, deadline=None)
@given(
    script=st.lists(EVENTS, max_size=6)
    | st.lists(EVENTS, max_size=5).map(lambda events: [ACCEPTED, *events]),
    failure=st.sampled_from([None, errors.Overloaded("x", retry_after=-3.0), errors.Draining("x"), "broken"]),
    cascade=st.booleans(),
)
async def test_any_reply_leaves_the_router_running_and_ends_the_request_properly(
    script: list[pb.GenerateResponse], failure: errors.HeadraceError | str | None, cascade: bool
) -> None:
    @dataclass
    class Failing(InvalidBatcher):
        async def Generate(
            self, request: pb.GenerateRequest, context: Any
        ) -> AsyncIterator[pb.GenerateResponse]:
            async for one in super().Generate(request, context):
                yield one
            if failure is not None:
                await self._fail(failure, context)

    given_settings = {
        "cascade": cascade,
        "thresholds": "0.9",
        "failover_seconds": 0.2,
        "prices": "only=1/2",
        "cascade_sample_seconds": 0.2,
    }
    rogue = Failing(script=script)
    async with routed(given_settings, only=rogue, spare=FakeBatcher(model="spare")) as client:
        request = prompt("ab", max_tokens=4)
        request.stream.include_route_changes = True
        ended: grpc.StatusCode | None = None
        try:
            await collect(client, request, timeout=PATIENCE)
        except errors.HeadraceError as error:
            ended = error.code
        honest = prompt("ab")
        honest.routing.tier = "spare"
        answer = await collect(client, honest)
        listed = await client.list_tiers()

    wrong = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert ended not in wrong
    assert answer.text == "ab"
    assert {charge.tier for charge in listed.bill.charges} <= {"only", "spare"}
    assert listed.tiers[1].healthy


LISTED = st.builds(
    lambda tiers, router: routing.ListTiersResponse(tiers=tiers, bill=pb.Bill() if router else None),
    st.lists(
        st.builds(
            lambda name, model, healthy, count, number, seconds: routing.Tier(
                name=name,
                model=model,
                healthy=healthy,
                limits=routing.TierLimits(context_length=count, queue_limit=count, max_running=count),
                load=routing.TierLoad(
                    queued=count, running=count, workers=count, tokens_per_second=number, oldest_wait=seconds
                ),
            ),
            NAMES,
            NAMES,
            st.booleans(),
            COUNTS,
            NUMBERS,
            timings().map(lambda timing: timing.decode),
        ),
        max_size=4,
    ),
    st.booleans(),
)


@given(LISTED)
def test_any_list_of_tiers_is_rejected_or_read_as_plausible_values(
    listed: routing.ListTiersResponse,
) -> None:
    try:
        seen = read_tiers(listed)
    except BadReply:
        return

    assert seen.router or len(listed.tiers) == 1
    assert seen.tier.healthy == any(tier.healthy for tier in listed.tiers)
    assert math.isfinite(seen.tier.load.tokens_per_second)
    assert seen.tier.load.tokens_per_second >= 0
    assert seen.tier.load.oldest_wait.ToNanoseconds() >= 0
    assert "" not in seen.models
