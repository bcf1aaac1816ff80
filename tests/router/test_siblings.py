"""The processes of one router know what their siblings know, and none waits for one that is dead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from headrace import errors
from headrace.client import Client, chat, connect
from headrace.router.__main__ import router
from headrace.router.settings import Settings
from headrace.router.siblings import Siblings, inboxes
from headrace.router.state.bills import Bill
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect, eventually, until_healthy
from tests.router.drafts import EASY, HARD
from tests.router.fake_batchers import FakeBatcher, serving_fake


@asynccontextmanager
async def three() -> AsyncGenerator[list[Siblings], None]:
    """Three processes' ends, all in this process."""
    mail = inboxes(3)
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Siblings(number, mail).listening()) for number in range(3)]
    for pair in mail:
        for end in pair:
            end.close()


@asynccontextmanager
async def processes(count: int = 2, **given: Any) -> AsyncGenerator[list[Client], None]:
    """Routers of one fleet of fake batchers that are siblings, on a port each; yield a client of each."""
    mail = inboxes(count)
    async with AsyncExitStack() as stack:
        small = await stack.enter_async_context(serving_fake(FakeBatcher()))
        large = await stack.enter_async_context(serving_fake(FakeBatcher()))
        clients = []
        for number in range(count):
            settings = Settings(
                port=0, tiers=f"small={small},large={large}", thresholds="0.4", drain_seconds=0, **given
            )
            gate = await stack.enter_async_context(router(settings, Siblings(number, mail)))
            clients.append(await stack.enter_async_context(connect(f"127.0.0.1:{gate.port}")))
            await until_healthy(clients[-1])
        yield clients
    for pair in mail:
        for end in pair:
            end.close()


def said(text: str) -> pb.GenerateRequest:
    request = chat(text)
    request.routing.session_id = "talk"
    return request


async def test_what_one_tells_reaches_all_others_and_not_itself() -> None:
    heard: list[tuple[int, str]] = []
    async with three() as siblings:
        for number, each in enumerate(siblings):
            each.on_tell("news", lambda text, number=number: heard.append((number, text)))
        siblings[0].tell("news", "a")
        siblings[2].tell("news", "b")
        await eventually(lambda: len(heard) == 4)

    assert sorted(heard) == [(0, "b"), (1, "a"), (1, "b"), (2, "a")]


async def test_a_question_has_the_answer_of_the_sibling_that_has_one() -> None:
    async def known(name: str) -> str | None:
        return f"{name} is here" if name == "x" else None

    async def unknown(name: str) -> None:
        return None

    async def refused(name: str) -> str:
        raise errors.AlreadyRated("it was", field="request_id")

    async with three() as siblings:
        siblings[1].on_ask("where", unknown)
        siblings[2].on_ask("where", known)
        assert await siblings[0].ask("where", "x") == "x is here"
        assert await siblings[0].ask("where", "y") is None
        assert await siblings[0].ask_all("where", "x") == ["x is here"]

        siblings[1].on_ask("where", refused)
        with pytest.raises(errors.AlreadyRated, match="it was"):
            await siblings[0].ask("where", "y")


async def test_a_dead_sibling_delays_an_answer_and_a_full_inbox_none() -> None:
    """Nobody reads the inbox of a process that restarts."""
    mail = inboxes(2)
    async with Siblings(0, mail).listening() as alone:
        assert await alone.ask("where", "x") is None
        for _ in range(10_000):
            alone.tell("news", "x" * 100)
        assert await asyncio.wait_for(alone.ask_all("where", "x"), 60) == []
    for pair in mail:
        for end in pair:
            end.close()


async def test_a_router_of_one_process_asks_nobody() -> None:
    async with Siblings().listening() as alone:
        alone.tell("news")
        assert await alone.ask("where") is None
        assert await alone.ask_all("where") == []


async def test_a_conversation_stays_on_its_tier_when_another_process_serves_it() -> None:
    async with processes() as (first, second):
        assert (await collect(first, said(HARD))).accepted.tier == "large"
        async with asyncio.timeout(60):
            while (await second.explain(said("Go on."))).tier != "large":
                await asyncio.sleep(0.01)
        assert (await collect(second, said("Go on."))).accepted.tier == "large"


async def test_feedback_reaches_the_process_that_answered() -> None:
    async with processes(3) as clients:
        id = (await collect(clients[0], chat(EASY))).accepted.request_id
        assert (await clients[2].feedback(id, ok=True)).tier == "small"
        assert (await clients[1].feedback(id, ok=True)).tier == "small"
        for client in clients:
            with pytest.raises(errors.AlreadyRated):
                await client.feedback(id, ok=False)
            with pytest.raises(errors.UnknownRequest):
                await client.feedback("who", ok=True)


@pytest.mark.parametrize("reporter", [0, 1, 2])
async def test_an_answer_id_is_known_to_all_processes_and_a_request_id_is_ambiguous_in_each(
    reporter: int,
) -> None:
    async with processes(3) as clients:
        request = chat(EASY)
        request.request_id = "q1"
        answers = [(await collect(client, request)).accepted.answer_id for client in clients[:2]]
        for client in clients:
            with pytest.raises(errors.InvalidRequest, match="answer_id"):
                await client.feedback("q1", ok=True)
        assert (await clients[2].feedback(answer_id=answers[0], ok=True)).tier == "small"
        # Now the id means the other answer, also where the rated one is.
        assert (await clients[reporter].feedback("q1", ok=False)).tier == "small"
        with pytest.raises(errors.AlreadyRated, match="with 0"):
            await clients[2].feedback(answer_id=answers[1], ok=True)


async def test_each_process_reports_the_shadow_bill_of_all(count: Callable[..., float]) -> None:
    before = count("headrace.shadow.requests", outcome="ok")
    async with processes(shadow_tier="large", shadow_share=1.0, prices="small=1/1,large=2/2") as clients:
        for client in clients:
            await collect(client, chat(EASY))
        await eventually(lambda: count("headrace.shadow.requests", outcome="ok") == before + 2)
        bills = [(await client.list_tiers()).shadow_bill for client in clients]

    assert [{charge.tier: charge.answers for charge in bill.charges} for bill in bills] == [{"large": 2}] * 2
    assert bills[0].cost == bills[1].cost > 0


async def test_processes_are_asked_for_everything_at_once() -> None:
    """A process that does not answer delays the tiers by one wait: others poll them each second."""
    mail = inboxes(2)
    topics = ("figures", "bill", "shadow_bill", "changes")
    all_asked = asyncio.Barrier(len(topics))
    theirs = Bill(["small", "large"], {})
    theirs.add_attempt("large")

    def answers(topic: str) -> Callable[[], Awaitable[object]]:
        async def answer() -> object:
            await all_asked.wait()
            return theirs if topic == "bill" else None

        return answer

    async with AsyncExitStack() as stack:
        other = await stack.enter_async_context(Siblings(1, mail).listening())
        for topic in topics:
            other.on_ask(topic, answers(topic))
        small, large = [await stack.enter_async_context(serving_fake(FakeBatcher())) for _ in range(2)]
        settings = Settings(
            port=0, tiers=f"small={small},large={large}", drain_seconds=0, shadow_tier="large"
        )
        gate = await stack.enter_async_context(router(settings, Siblings(0, mail)))
        client = await stack.enter_async_context(connect(f"127.0.0.1:{gate.port}"))
        listed = await client.list_tiers()
    for pair in mail:
        for end in pair:
            end.close()

    assert [charge.tier for charge in listed.bill.charges] == ["large"]


async def test_each_process_reports_the_bill_of_all() -> None:
    async with processes() as (first, second):
        await collect(first, chat(EASY))
        await collect(first, chat(EASY))
        await collect(second, chat(HARD))
        bills = [(await client.list_tiers()).bill for client in (first, second)]

    assert [{charge.tier: charge.answers for charge in bill.charges} for bill in bills] == [
        {"small": 2, "large": 1}
    ] * 2
