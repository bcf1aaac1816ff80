"""Whatever a batcher replies, the router lives, the request ends rightly, and the books stay the router's."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import errors
from headrace.cli.mesh import reserved_ports
from headrace.client import Client, chat, connect
from headrace.router.__main__ import router
from headrace.router.answering import replies
from headrace.router.settings import Settings
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from tests.harness import PATIENCE, collect, eventually, prompt, until_healthy
from tests.router.fake_batchers import Front, routed, routing_port, serving_front

PRICES = {"prices": "cheap=1/2,dear=10/20"}


@dataclass
class Rogue(Front):
    """Sends the events of `script` as they are, whatever it is asked, then ends, or goes on for ever.

    lingers   leaves its stream open after the last event
    """

    script: Sequence[pb.GenerateResponse] = ()
    lingers: bool = False
    left: int = 0

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        try:
            for event in self.script:
                yield event
            if self.lingers:
                await asyncio.Event().wait()
        finally:
            self.left += 1


def event(**fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(**fields)


ACCEPTED = event(accepted=pb.Accepted(model="echo", tier="somewhere", prompt_tokens=3))
FINISH = event(
    finish=pb.Finish(reason=pb.FINISH_REASON_STOP, usage=pb.Usage(prompt_tokens=3, completion_tokens=1))
)


def delta(offset: int, text: str = "a", **fields: Any) -> pb.GenerateResponse:
    given = {"token_count": 1, "token_ids": [97], **fields}
    return event(delta=pb.Delta(offset=offset, text=text, **given))


async def read(client: Client, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    async with aclosing(client.generate(request, timeout=PATIENCE, resume=False)) as stream:
        return [response async for response in stream]


@pytest.mark.parametrize(
    ("listed", "problem"),
    [
        (routing.ListTiersResponse(), "names no tier"),
        (
            routing.ListTiersResponse(tiers=[routing.Tier(healthy=True), routing.Tier(healthy=True)]),
            "names 2 tiers",
        ),
        (routing.ListTiersResponse(tiers=[routing.Tier(healthy=True, model="m" * 300)]), "a model of 300"),
        (routing.ListTiersResponse(tiers=[routing.Tier(healthy=True, name="n" * 300)]), "a name of 300"),
        (routing.ListTiersResponse(bill=pb.Bill()), "names no tier"),
    ],
)
async def test_a_malformed_list_of_tiers_makes_that_batcher_unhealthy_and_nothing_else(
    listed: routing.ListTiersResponse, problem: str
) -> None:
    front = Front()
    async with routed({"poll_seconds": 0.02}, small=front, large=Front()) as client:
        front.listed = listed
        async with asyncio.timeout(PATIENCE):
            while (await client.list_tiers()).tiers[0].healthy:
                await asyncio.sleep(0.01)
        seen = (await client.list_tiers()).tiers
        answer = await collect(client, chat("Hi!"))
        front.listed = None
        async with asyncio.timeout(PATIENCE):
            while not (await client.list_tiers()).tiers[0].healthy:
                await asyncio.sleep(0.01)

    assert problem in seen[0].unhealthy_reason
    assert seen[1].healthy
    assert answer.accepted.tier == "large"


async def test_counts_that_do_not_fit_together_are_as_many_as_can_be_said() -> None:
    most = 2**32 - 1
    tier = routing.Tier(
        healthy=True,
        limits=routing.TierLimits(queue_limit=most, max_running=most),
        load=routing.TierLoad(queued=most - 1, running=most, tokens_per_second=math.nan),
    )
    tier.load.oldest_wait.seconds = -5
    listed = routing.ListTiersResponse(tiers=[tier])
    async with routed(only=[Front(listed=listed), Front(listed=listed)]) as client:
        (seen,) = (await client.list_tiers()).tiers
        answer = await collect(client, chat("Hi!"))

    assert seen.load.queued == seen.limits.queue_limit == most
    assert seen.load.tokens_per_second == 0
    assert seen.load.oldest_wait.ToNanoseconds() == 0
    assert answer.finish.reason == pb.FINISH_REASON_STOP


async def test_a_refusal_to_list_tiers_is_no_silence() -> None:
    """A server of another kind at the address answers at once, and is no batcher."""

    @dataclass
    class Other(Front):
        other: bool = False

        async def ListTiers(self, request: object, context: object) -> routing.ListTiersResponse:
            if self.other:
                raise errors.Unimplemented("no such method")
            return await super().ListTiers(request, context)

    front = Other()
    async with routed({"poll_seconds": 0.02, "stall_seconds": 3600}, only=front) as client:
        front.other = True
        async with asyncio.timeout(PATIENCE):
            while (await client.list_tiers()).tiers[0].healthy:
                await asyncio.sleep(0.01)


async def test_the_routers_own_name_for_a_tier_is_the_one_that_counts() -> None:
    """`--tiers cheap=...` before a batcher of `--tier small`."""
    cheap, dear = Front(tier="small"), Front(tier="huge")
    async with routed(PRICES, cheap=cheap, dear=dear) as client:
        request = chat("Hi!")
        request.routing.session_id = "s"
        request.routing.min_tier = request.routing.max_tier = request.routing.tier = "cheap"
        pinned = await collect(client, request)
        request.ClearField("routing")
        request.routing.session_id = "s"
        free = await collect(client, request)
        said = await client.feedback(free.accepted.request_id, ok=True)
        bill = (await client.list_tiers()).bill

    assert (pinned.accepted.tier, free.accepted.tier, said.tier) == ("cheap", "cheap", "cheap")
    assert [charge.tier for charge in pinned.finish.bill.charges] == ["cheap"]
    assert [(charge.tier, charge.answers) for charge in bill.charges] == [("cheap", 2)]
    asked = cheap.requests[0].routing
    assert (asked.tier, asked.min_tier, asked.max_tier, asked.session_id) == ("", "", "", "s")


async def test_a_draft_of_a_tier_that_names_itself_otherwise_is_escalated() -> None:
    settings = {"cascade": True, "cascade_release": 1.0, "thresholds": "0.9", **PRICES}
    async with routed(settings, cheap=Front(tier="dear"), dear=Front(tier="cheap")) as client:
        answer = await collect(client, chat("Hi!"))

    assert answer.accepted.tier == "dear"
    charges = {charge.tier: (charge.answers, charge.wasted_tokens) for charge in answer.finish.bill.charges}
    assert charges == {"cheap": (0, 3), "dear": (1, 0)}


@asynccontextmanager
async def nested(
    settings: dict[str, Any], small: Front, large: Front, dear: Front
) -> AsyncGenerator[Client, None]:
    """A router with the tiers cheap and dear; behind cheap a router with small and large."""
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(routing_port(settings, small=small, large=large))
        outer = {"thresholds": "0.99", **PRICES}
        yield await stack.enter_async_context(routed(outer, cheap=f"127.0.0.1:{port}", dear=dear))


async def test_a_router_may_stand_before_a_router_with_one_bill() -> None:
    small, large, dear = Front(model="s"), Front(model="l"), Front(model="d")
    inner = {"cascade": True, "cascade_release": 1.0, "thresholds": "0.9", "prices": "small=5/5,large=6/6"}
    request = chat("Hi!")
    request.stream.include_route_changes = True
    async with nested(inner, small, large, dear) as client:
        events = await read(client, request)
        listed = await client.list_tiers()
        pinned = chat("Hi!")
        pinned.routing.model = "l"
        pinned.routing.tier = "cheap"
        by_model = await collect(client, pinned)
        pinned.routing.model = "x"
        with pytest.raises(errors.UnknownModel, match="the models are d, l, s"):
            await collect(client, pinned)

    kinds = [one.WhichOneof("event") for one in events]
    assert kinds == ["accepted", "route_change", "delta", "delta", "delta", "finish"]
    assert events[0].accepted.tier == "cheap"
    assert (getattr(events[1].route_change, "from"), events[1].route_change.to) == (
        "cheap/small",
        "cheap/large",
    )
    (charge,) = events[-1].finish.bill.charges
    assert (charge.tier, charge.completion_tokens, charge.wasted_tokens) == ("cheap", 3, 3)
    assert events[-1].finish.bill.cost == pytest.approx(6 * 2 / 1e6), "by the prices of the first router"
    assert (listed.tiers[0].model, listed.tiers[0].healthy) == ("s, l", True)
    assert by_model.accepted.model == "l"
    assert len(small.requests) == 1
    assert dear.requests == []


async def test_routers_that_name_each_other_pass_a_request_on_so_often_and_no_more() -> None:
    """And each falls back to the tiers that are its own."""
    front = Front()
    async with AsyncExitStack() as stack:
        first, second = stack.enter_context(reserved_ports(2))
        address = await stack.enter_async_context(serving_front(front))
        fast: dict[str, Any] = {
            "drain_seconds": 0,
            "poll_seconds": 0.05,
            "wait_seconds": 0,
            "thresholds": "0.99",
        }
        for port, other in ((first, second), (second, first)):
            tiers = f"other=127.0.0.1:{other},own={address}"
            await stack.enter_async_context(router(Settings(port=port, tiers=tiers, **fast)))
        client = await stack.enter_async_context(connect(f"127.0.0.1:{first}", retries=0))
        await until_healthy(client, True, True)
        answer = await collect(client, prompt("abc"))

        only = prompt("abc")
        only.routing.allow_escalation = False
        with pytest.raises(errors.NoWorkers, match="name each other as tiers"):
            await collect(client, only)

    assert answer.text == "abc"
    assert len(front.requests) == 1


async def test_an_answer_that_lost_a_router_behind_the_router_goes_on_with_its_model() -> None:
    small, large, dear = Front(model="s", breaks=[1, 1, 1]), Front(model="l"), Front(model="d")
    async with nested({}, small, large, dear) as client:
        answer = await collect(client, prompt("all of it"))

    assert answer.text == "all of it"
    assert {request.routing.model for request in small.requests} == {"", "s"}
    assert large.requests == dear.requests == []


@pytest.mark.parametrize(
    "script",
    [
        [],
        [delta(0), FINISH],
        [FINISH],
        [event()],
        [event(route_change=pb.RouteChange(to="elsewhere"))],
        [event(accepted=pb.Accepted(model="m" * 300)), FINISH],
    ],
)
async def test_a_stream_that_does_not_begin_as_it_should_is_another_batchers_to_answer(
    script: list[pb.GenerateResponse],
) -> None:
    async with routed(only=[Rogue(script=script), Front(running=9)]) as client:
        answer = await collect(client, prompt("abc"))

    assert answer.text == "abc"


@pytest.mark.parametrize(
    "script",
    [
        [ACCEPTED, ACCEPTED],
        [ACCEPTED, delta(5)],
        [ACCEPTED, delta(0), delta(0)],
        [ACCEPTED, delta(0, token_count=2)],
        [ACCEPTED, delta(0, logprobs=[-1.0, -2.0])],
        [ACCEPTED, delta(0), delta(1, token_count=0, token_ids=[]), delta(1)],
        [ACCEPTED, event(finish=pb.Finish())],
        [ACCEPTED, event(finish=pb.Finish(reason=pb.FINISH_REASON_CANCELLED))],
        [ACCEPTED, event(route_change=pb.RouteChange(attempt=2**32 - 1))],
        [ACCEPTED, *(delta(place) for place in range(9))],
        [ACCEPTED, delta(0)],
    ],
)
async def test_a_stream_that_goes_on_as_it_should_not_is_carried_on_elsewhere(
    script: list[pb.GenerateResponse],
) -> None:
    rogue, other = Rogue(script=script), Front(running=9)
    async with routed(only=[rogue, other]) as client:
        answer = await collect(client, prompt("aaaaaaaa", max_tokens=8))

    assert answer.text == "aaaaaaaa"
    assert len(rogue.requests) == len(other.requests) == 1


class Garbage(grpc.GenericRpcHandler):
    """Answers each request with bytes that are no message, and each look, too, once it is `broken`."""

    broken = False

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        async def list_tiers(request: bytes, context: Any) -> bytes:
            first = routing.ListTiersResponse(tiers=[routing.Tier(healthy=True)])
            return first.SerializeToString() if not self.broken else b"\xff\xff\xff"

        async def generate(request: bytes, context: Any) -> AsyncIterator[bytes]:
            yield ACCEPTED.SerializeToString()
            yield b"\xff\xff\xff"

        if call.method.endswith("ListTiers"):
            return grpc.unary_unary_rpc_method_handler(list_tiers)
        return grpc.unary_stream_rpc_method_handler(generate)


async def test_bytes_that_are_no_message_are_a_lost_batchers() -> None:
    server = grpc.aio.server()
    garbage = Garbage()
    server.add_generic_rpc_handlers((garbage,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with routed(
            {"poll_seconds": 0.05}, small=f"127.0.0.1:{port}", large=Front(model="large")
        ) as client:
            with pytest.raises(errors.BatcherLost):
                await collect(client, prompt("x"))
            garbage.broken = True
            async with asyncio.timeout(PATIENCE):
                while (await client.list_tiers()).tiers[0].healthy:
                    await asyncio.sleep(0.01)
            answer = await collect(client, prompt("x"))
    finally:
        await server.stop(None)

    assert answer.accepted.tier == "large"


@pytest.mark.parametrize("more", [[FINISH], [delta(1)], [ACCEPTED], [event()], []])
async def test_what_follows_the_finish_is_nobodys(more: list[pb.GenerateResponse]) -> None:
    rogue = Rogue(script=[ACCEPTED, delta(0), FINISH, *more], lingers=True)
    async with routed(only=rogue) as client:
        answer = await collect(client, prompt("a"))
        await eventually(lambda: rogue.left == 1)

    assert answer.text == "a"


async def test_figures_that_cannot_be_leave_the_books_as_they_are() -> None:
    most = 2**32 - 1
    finish = pb.Finish(
        reason=pb.FINISH_REASON_STOP,
        stop_sequence="x" * 1000,
        usage=pb.Usage(
            prompt_tokens=most,
            cached_tokens=most,
            completion_tokens=most,
            replayed_tokens=most,
            wasted_tokens=most,
        ),
        bill=pb.Bill(charges=[pb.Charge(tier="only", prompt_tokens=2**64 - 1) for _ in range(3)]),
    )
    finish.timing.first_token.seconds = -1
    finish.timing.decode.seconds = 2**62
    accepted = pb.Accepted(request_id="another", model="echo", prompt_tokens=most, seed=5, score=math.nan)
    script = [event(accepted=accepted), delta(0), event(finish=finish)]
    request = prompt("a", seed=7)
    request.request_id = "mine"
    async with routed(PRICES | {"prices": "only=1/2"}, only=Rogue(script=script)) as client:
        for _ in range(3):
            answer = await collect(client, request)
        bill = (await client.list_tiers()).bill

    assert (answer.accepted.request_id, answer.accepted.seed) == ("mine", 7)
    assert 0 <= answer.accepted.score <= 1
    assert answer.finish.usage.completion_tokens == 1
    assert not answer.finish.stop_sequence
    assert not answer.finish.timing.ListFields()
    assert [(charge.tier, charge.completion_tokens) for charge in bill.charges] == [("only", 3)]


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
        st.integers(0, 9),
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
async def test_whatever_a_batcher_sends_the_request_ends_rightly_and_the_router_lives(
    script: list[pb.GenerateResponse], failure: errors.HeadraceError | str | None, cascade: bool
) -> None:
    @dataclass
    class Failing(Rogue):
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
        "resume_seconds": 0.2,
        "prices": "only=1/2",
        "cascade_sample_seconds": 0.2,
    }
    rogue = Failing(script=script)
    async with routed(given_settings, only=rogue, spare=Front(model="spare")) as client:
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
def test_a_list_of_tiers_is_refused_or_read_as_what_can_be(
    listed: routing.ListTiersResponse,
) -> None:
    try:
        seen = replies.read_tiers(listed)
    except replies.BadReply:
        return

    assert seen.router or len(listed.tiers) == 1
    assert seen.tier.healthy == any(tier.healthy for tier in listed.tiers)
    assert math.isfinite(seen.tier.load.tokens_per_second)
    assert seen.tier.load.tokens_per_second >= 0
    assert seen.tier.load.oldest_wait.ToNanoseconds() >= 0
    assert "" not in seen.models
