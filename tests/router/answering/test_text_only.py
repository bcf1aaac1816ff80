"""An answer of text alone is passed on as it is, and ends with one error when its stream is lost."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import errors
from headrace.client import Client, chat, connect
from headrace.router.answering.prompts import estimated_tokens
from headrace.v1 import generation_pb2 as pb
from tests.harness import PATIENCE, collect, prompt
from tests.router.fake_batchers import FakeBatcher, routed, routing_port, serving_fake
from tests.router.rogue import FINISH, InvalidBatcher, event

SAID = "all that was said before"
USAGE = pb.Usage(prompt_tokens=20, completion_tokens=9, cached_tokens=4)
PRICES = {"prices": "small=1/2,large=10/20"}
ACCEPTED = event(accepted=pb.Accepted(model="echo", text_only=True))


def outside(**options: Any) -> FakeBatcher:
    """Return a batcher whose answers are text alone."""
    return FakeBatcher(**{"text_only": True, "usage": USAGE, **options})


def part(offset: int, count: int = 1, text: str = "a", **fields: Any) -> pb.GenerateResponse:
    return event(delta=pb.Delta(offset=offset, token_count=count, text=text, **fields))


async def until_lost(
    client: Client, request: pb.GenerateRequest, **options: Any
) -> tuple[str, errors.HeadraceError]:
    """Return the text that was delivered, and the error that ended the answer."""
    text = ""
    with pytest.raises(errors.HeadraceError) as caught:
        async with aclosing(client.generate(request, timeout=PATIENCE, **options)) as stream:
            async for response in stream:
                text += response.delta.text
    return text, caught.value


async def test_a_text_alone_is_passed_on_with_the_usage_of_its_service() -> None:
    async with routed({"prices": "only=1/2/0.5"}, only=outside(pieces=3)) as client:
        answer = await collect(client, prompt(SAID))

    assert answer.accepted.text_only
    assert answer.accepted.prompt_tokens == 0
    assert (answer.text, answer.ids, answer.tokens) == (SAID, [], len(SAID))
    usage = answer.finish.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (20, 9, 4)
    (charge,) = answer.finish.bill.charges
    assert (charge.prompt_tokens, charge.completion_tokens, charge.cached_tokens) == (20, 9, 4)
    assert charge.cost == pytest.approx((16 * 1 + 4 * 0.5 + 9 * 2) / 1e6)


async def test_more_deltas_than_max_tokens_are_no_violation() -> None:
    """Their tokens are an estimate: a service may send a token in parts."""
    async with routed(only=outside()) as client:
        answer = await collect(client, prompt(SAID, max_tokens=4))

    assert answer.text == SAID
    assert answer.finish.usage.completion_tokens == 9


@pytest.mark.parametrize(
    "failure",
    [
        "broken",
        errors.UpstreamLost("the service outside broke off"),
        errors.Draining("stopping", retry_after=0.01),
        errors.BatcherLost("lost"),
        errors.RequestCancelled("a proxy was stopped"),
    ],
)
async def test_an_answer_that_is_lost_after_its_first_delta_ends_with_what_was_delivered(
    failure: errors.HeadraceError | str,
) -> None:
    first, second = outside(breaks=[5], breaks_with=failure), outside(running=9)
    larger = FakeBatcher()
    async with routed(small=[first, second], large=larger) as client:
        text, error = await until_lost(client, prompt(SAID))

    assert text == SAID[:5]
    assert type(error) is errors.UpstreamLost
    assert (len(first.requests), second.requests, larger.requests) == (1, [], [])


async def test_an_answer_without_a_finish_was_lost() -> None:
    rogue = InvalidBatcher(script=[ACCEPTED, part(0, text="so far")])
    async with routed(only=rogue) as client:
        text, error = await until_lost(client, prompt(SAID))

    assert text == "so far"
    assert isinstance(error, errors.UpstreamLost)
    assert error.fields == {"cause": "BATCHER_LOST"}
    assert len(rogue.requests) == 1


async def test_an_answer_of_a_slow_reader_is_not_resumed_and_says_why() -> None:
    async with routed(only=outside(breaks=[2], breaks_with=errors.SlowReader("read faster"))) as client:
        text, error = await until_lost(client, prompt(SAID))

    assert text == SAID[:2]
    assert isinstance(error, errors.SlowReader)


@pytest.mark.parametrize(
    "refusal",
    [errors.NoWorkers("the breaker is open"), errors.UpstreamLost("it was lost"), errors.Overloaded("full")],
)
async def test_a_request_that_was_not_accepted_goes_to_another_batcher_and_then_to_another_tier(
    refusal: errors.HeadraceError,
) -> None:
    refusing = [outside(refuses=refusal), outside(refuses=refusal)]
    async with routed(only=[refusing[0], outside(running=9)]) as client:
        assert (await collect(client, prompt(SAID))).text == SAID
    async with routed({"thresholds": "0.99"}, small=refusing[1], large=outside()) as client:
        answer = await collect(client, chat("Hello!"))

    assert answer.accepted.tier == "large"
    assert [len(fake.requests) for fake in refusing] == [1, 1]


async def test_an_answer_that_loses_its_batcher_before_its_first_delta_starts_again_on_the_tier() -> None:
    first, second = outside(breaks=[0]), outside(running=9)
    async with routed(only=[first, second]) as client:
        answer = await collect(client, prompt(SAID))

    assert answer.text == SAID
    assert not second.requests[0].resume.token_ids
    assert second.requests[0].resume.attempt == 1


@pytest.mark.parametrize(
    "script",
    [
        [ACCEPTED, part(0, token_ids=[97]), FINISH],
        [ACCEPTED, part(1), FINISH],
        [ACCEPTED, part(0, 2**32 - 1), FINISH],
        [ACCEPTED, part(0, logprobs=[0.5]), FINISH],
        [ACCEPTED, part(0, logprobs=[math.nan]), FINISH],
    ],
)
async def test_a_first_delta_that_violates_the_contract_is_not_delivered(
    script: list[pb.GenerateResponse],
) -> None:
    rogue = InvalidBatcher(script=script)
    async with routed(only=[rogue, outside(running=9)]) as client:
        answer = await collect(client, prompt(SAID))

    assert answer.text == SAID, "nothing was delivered, so another batcher answers"


@pytest.mark.parametrize("wrong", [part(1, token_ids=[97]), part(3), part(0), ACCEPTED])
async def test_a_later_event_that_violates_the_contract_ends_the_answer(wrong: pb.GenerateResponse) -> None:
    other = outside(running=9)
    async with routed(only=[InvalidBatcher(script=[ACCEPTED, part(0), wrong, FINISH]), other]) as client:
        request = prompt(SAID)
        request.stream.flush_tokens = 1  # the first delta is delivered before the second arrives
        text, error = await until_lost(client, request)

    assert text == "a"
    assert isinstance(error, errors.UpstreamLost)
    assert other.requests == []


@pytest.mark.parametrize("begins_with_text", [True, False])
async def test_a_batcher_may_not_change_between_text_alone_and_tokens(begins_with_text: bool) -> None:
    first = outside(text_only=begins_with_text, breaks=[0])
    second = outside(text_only=not begins_with_text, running=9)
    async with routed({"failover_seconds": 0.3}, only=[first, second]) as client:
        answer = await collect(client, prompt(SAID))

    assert answer.text == SAID
    assert answer.accepted.text_only == begins_with_text
    assert len(first.requests) == 2, "the other batcher was left alone after its `accepted`"


async def test_tokens_are_not_continued_with_text_alone() -> None:
    async with routed(
        {"failover_seconds": 0.3}, only=[FakeBatcher(breaks=[5]), outside(running=9)]
    ) as client:
        answer = await collect(client, prompt(SAID))

    assert (answer.text, answer.ids) == (SAID, list(SAID.encode()))


async def test_deltas_without_tokens_are_delivered_in_their_place() -> None:
    """Such as the name of a tool before its arguments."""
    script = [ACCEPTED, part(0), part(1, 0, "b"), part(1, 2, "c"), part(3, 0, "d"), FINISH]
    async with routed(only=InvalidBatcher(script=script)) as client:
        answer = await collect(client, prompt(SAID))

    assert (answer.text, answer.tokens) == ("abcd", 3)


async def test_log_probabilities_need_not_be_as_many_as_the_estimated_tokens() -> None:
    def token(text: bytes) -> pb.TokenLogprobs:
        return pb.TokenLogprobs(token=pb.TokenLogprob(logprob=-1, text=text))

    script = [
        ACCEPTED,
        part(0, 1, "thought"),
        part(1, 1, "ab", tokens=[token(b"a"), token(b"b")], logprobs=[-1, -1]),
        FINISH,
    ]
    async with routed(only=InvalidBatcher(script=script)) as client:
        answer = await collect(client, prompt(SAID, top_logprobs=0, logprobs=True))

    assert [described.token.text for described in answer.details] == [b"a", b"b"]
    assert answer.logprobs == [-1, -1]


async def test_without_usage_the_bill_estimates_and_the_answer_says_that_nothing_was_reported() -> None:
    async with routed({"prices": "only=1/2"}, only=outside(usage=None)) as client:
        answer = await collect(client, prompt(SAID))

    usage = answer.finish.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (0, len(SAID))
    (charge,) = answer.finish.bill.charges
    assert (charge.prompt_tokens, charge.completion_tokens) == (len(SAID) // 4, len(SAID))


async def test_an_implausible_usage_does_not_harm_the_bill() -> None:
    most = 2**32 - 1
    lying = outside(usage=pb.Usage(prompt_tokens=most, completion_tokens=most, cached_tokens=most))
    async with routed({"prices": "only=1/2"}, only=lying) as client:
        bill = (await collect(client, prompt(SAID))).finish.bill

    assert bill.charges[0].prompt_tokens == bill.charges[0].completion_tokens == 2**31
    assert math.isfinite(bill.cost)


@pytest.mark.parametrize("leaves", [True, False])
async def test_what_was_delivered_of_a_lost_answer_is_billed_with_an_estimate_of_the_prompt(
    leaves: bool, count: Callable[..., float]
) -> None:
    lost = count("headrace.requests", error="UPSTREAM_LOST")
    text = "word " * 100
    async with routed({"prices": "only=1/2"}, only=outside(breaks=[5, 5])) as client:
        if leaves:
            async with aclosing(client.generate(prompt(text), timeout=PATIENCE)) as stream:
                assert (await anext(stream)).accepted.text_only
                assert (await anext(stream)).delta.text
        else:
            await until_lost(client, prompt(text))
        while not (bill := (await client.list_tiers()).bill).charges:
            continue

    (charge,) = bill.charges
    assert charge.prompt_tokens == len(text) / 4 == estimated_tokens(prompt(text))
    assert 1 <= charge.completion_tokens <= 5
    assert bill.cost > 0
    assert leaves or count("headrace.requests", error="UPSTREAM_LOST") == lost + 1


async def test_a_router_in_front_passes_a_text_alone_on_and_bills_it_once() -> None:
    async with (
        routing_port(PRICES, small=outside(usage=None), large=outside()) as port,
        routed({"prices": "inner=1/2"}, inner=f"127.0.0.1:{port}") as client,
    ):
        answer = await collect(client, prompt(SAID))
    async with routing_port(only=outside(breaks=[5])) as port, routed(inner=f"127.0.0.1:{port}") as client:
        text, error = await until_lost(client, prompt(SAID))

    assert answer.accepted.text_only
    (charge,) = answer.finish.bill.charges
    assert (charge.prompt_tokens, charge.completion_tokens) == (len(SAID) // 4, len(SAID))
    assert text == SAID[:5]
    assert isinstance(error, errors.UpstreamLost)


# The client.


async def test_the_client_does_not_repeat_an_answer_of_which_it_delivered_a_part() -> None:
    fake = outside(breaks=[5, 5])
    async with routing_port(only=fake) as port, connect(f"127.0.0.1:{port}", retries=2) as client:
        text, error = await until_lost(client, prompt(SAID))

    assert text == SAID[:5]
    assert isinstance(error, errors.UpstreamLost)
    assert len(fake.requests) == 1


async def test_the_client_repeats_an_answer_that_was_lost_before_its_first_delta() -> None:
    fake = outside(refuses=errors.NoWorkers("its breaker is open"), refusals=1)
    async with routing_port(only=fake) as port, connect(f"127.0.0.1:{port}", retries=2) as client:
        answer = await collect(client, prompt(SAID))

    assert answer.text == SAID
    assert len(fake.requests) == 2


@pytest.mark.parametrize("failure", ["broken", errors.Draining("stopping", retry_after=0.01)])
async def test_a_client_that_loses_its_server_gets_the_same_error(
    failure: errors.HeadraceError | str,
) -> None:
    """A batcher stands for a router that dies: it implements the same service."""
    fake = outside(breaks=[5], breaks_with=failure)
    async with serving_fake(fake) as address, connect(address, retries=2) as client:
        text, error = await until_lost(client, prompt(SAID))

    assert text == SAID[:5]
    assert isinstance(error, errors.UpstreamLost)
    assert len(fake.requests) == 1


# Any sequence of events.

COUNTS = st.sampled_from([0, 1, 2, 2**31, 2**32 - 1])
EVENTS = st.one_of(
    st.just(ACCEPTED),
    st.just(event(accepted=pb.Accepted(model="echo"))),
    st.just(event(accepted=pb.Accepted(model="echo", text_only=True, prompt_tokens=2**32 - 1))),
    st.just(event()),
    st.builds(
        lambda offset, count, ids, logprobs: part(offset, count, "t", token_ids=ids, logprobs=logprobs),
        st.integers(0, 4),
        COUNTS,
        st.sampled_from([[], [], [], [97]]),
        st.lists(st.sampled_from([-1.0, 0.0, math.nan, -math.inf, 3.0]), max_size=2),
    ),
    st.builds(
        lambda reason, prompt_tokens, tokens: event(
            finish=pb.Finish(
                reason=reason,
                usage=pb.Usage(
                    prompt_tokens=prompt_tokens, completion_tokens=tokens, cached_tokens=prompt_tokens
                ),
            )
        ),
        st.integers(0, 5),
        COUNTS,
        COUNTS,
    ),
    st.just(event(prompt_tokens=pb.PromptTokens(tokens=[pb.TokenLogprobs()]))),
    st.just(event(delta=pb.Delta(tool_calls=[pb.ToolCallDelta(index=0, id="call", name="clock")]))),
)


def _continuing(counts: list[int]) -> list[pb.GenerateResponse]:
    """Return an answer that keeps to the contract, up to its end."""
    return [ACCEPTED, *(part(sum(counts[:place]), count) for place, count in enumerate(counts))]


@settings(max_examples=40, deadline=None)
@given(
    begin=st.lists(st.integers(0, 3), max_size=4).map(_continuing) | st.just([]),
    rest=st.lists(EVENTS, max_size=4) | st.just([FINISH]),
    failure=st.sampled_from(
        [None, errors.Overloaded("x"), errors.UpstreamLost("x"), errors.Draining("x"), "x"]
    ),
    cascade=st.booleans(),
)
async def test_any_sequence_of_events_is_a_valid_stream_or_ends_with_one_typed_error(
    begin: list[pb.GenerateResponse],
    rest: list[pb.GenerateResponse],
    failure: errors.HeadraceError | str | None,
    cascade: bool,
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
        "thresholds": "0.99",
        "failover_seconds": 0.1,
        "prices": "small=1/2",
    }
    rogue, spare = Failing(script=[*begin, *rest]), FakeBatcher(model="spare")
    delivered = 0
    error: errors.HeadraceError | None = None
    async with routed(given_settings, small=rogue, large=spare) as client:
        request = chat("ab", max_tokens=2)
        try:
            async with aclosing(client.generate(request, timeout=PATIENCE)) as stream:
                kinds = []
                async for response in stream:
                    kinds.append(response.WhichOneof("event"))
                    if kinds[-1] == "delta":
                        assert response.delta.offset == delivered
                        delivered += response.delta.token_count
            assert kinds[0] == "accepted"
            assert kinds[-1] == "finish"
        except errors.HeadraceError as raised:
            error = raised
        bill = (await client.list_tiers()).bill

    assert error is None or isinstance(
        error, errors.Unavailable | errors.Overloaded | errors.InvalidSampling
    ), error
    assert all(charge.prompt_tokens <= 2**33 for charge in bill.charges)
    small_attempts = sum(charge.attempts for charge in bill.charges if charge.tier == "small")
    assert small_attempts <= 10
    if isinstance(error, errors.UpstreamLost):
        assert len(rogue.requests) <= 3
