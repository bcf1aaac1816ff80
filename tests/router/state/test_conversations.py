"""Conversations keep the tier that they have reached, for a limited time and in limited number."""

from __future__ import annotations

import pytest

from headrace.client import chat
from headrace.router.state.conversations import Conversations
from headrace.routing.scoring.conversation import Earlier
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect
from tests.router.drafts import EASY, HARD
from tests.router.fake_batchers import FakeBatcher, routed

SMALL, LARGE = Earlier(0.2, "small"), Earlier(0.7, "large")


def test_a_conversation_keeps_its_tier_until_it_has_been_idle() -> None:
    conversations = Conversations(idle_seconds=60)
    conversations.record("tenant", "talk", LARGE, 0.0)

    assert conversations.reached("tenant", "talk", 60.0) == "large"
    assert conversations.reached("tenant", "talk", 60.1) == ""
    assert conversations.reached("other", "talk", 1.0) == "", "session ids are the tenant's own"
    assert conversations.reached("tenant", "", 1.0) == ""


def test_no_tenants_conversations_are_forgotten_for_anothers_new_ones() -> None:
    conversations = Conversations(limit=100)
    for place in range(5):
        conversations.record("honest", str(place), LARGE, 0.0)
    for place in range(10_000):
        conversations.record("flood", str(place), SMALL, 1.0)

    assert len(conversations) == 100
    assert [conversations.reached("honest", str(place), 2.0) for place in range(5)] == ["large"] * 5
    assert conversations.reached("flood", "9999", 2.0) == "small"
    assert conversations.reached("flood", "0", 2.0) == ""


def test_a_flood_of_tenants_takes_from_those_that_hold_most_first() -> None:
    conversations = Conversations(limit=100)
    for place in range(60):
        conversations.record("busy", str(place), LARGE, 0.0)
    for place in range(90):
        conversations.record(f"tenant {place}", "talk", LARGE, 0.0)

    assert sum(bool(conversations.reached("busy", str(place), 1.0)) for place in range(60)) == 10
    assert all(conversations.reached(f"tenant {place}", "talk", 1.0) for place in range(90))


def test_the_least_recently_used_are_forgotten_first() -> None:
    conversations = Conversations(limit=2)
    for place, name in enumerate(["a", "b", "a", "c"]):
        conversations.record("", name, SMALL, place)
    conversations.record("", "", SMALL, 5)

    assert len(conversations) == 2
    assert [conversations.reached("", name, 5) for name in "abc"] == ["small", "", "small"]


def said(text: str, session: str, tenant: str = "") -> pb.GenerateRequest:
    """Return a request of a caller that sends the last turn only."""
    request = chat(text)
    request.routing.session_id = session
    request.routing.tenant = tenant
    return request


async def test_a_turn_that_continues_a_conversation_stays_on_its_tier() -> None:
    async with routed({"thresholds": "0.4"}, small=FakeBatcher(), large=FakeBatcher()) as client:
        tiers = [
            (await collect(client, request)).accepted.tier
            for request in (said(EASY, "a"), said(HARD, "a"), said("Go on.", "a"), said("Go on.", "b"))
        ]
        explained = await client.explain(said("And why?", "a"))
        other = await client.explain(said("Go on.", "a", tenant="other"))

    assert tiers == ["small", "large", "large", "small"]
    assert explained.tier == "large"
    assert "of the turns that it continues" in explained.why
    assert "turn:inherited" in [feature.name for feature in explained.features]
    assert other.tier == "small", "session ids are the tenant's own"


async def test_a_tier_that_was_reached_for_other_reasons_than_the_score_is_kept_while_the_topic_is() -> None:
    async with routed({"thresholds": "0.4"}, small=FakeBatcher(), large=FakeBatcher()) as client:
        pinned = said(EASY, "a")
        pinned.routing.tier = "large"
        await collect(client, pinned)
        goes_on = await client.explain(said("Go on.", "a"))
        changes = await client.explain(said("What is the capital of France?", "a"))

    assert goes_on.tier == "large"
    assert "its conversation has reached 'large'" in goes_on.why
    assert changes.tier == "small"


async def test_thanks_and_other_topics_go_small_and_only_another_topic_is_remembered() -> None:
    async with routed({"thresholds": "0.4"}, small=FakeBatcher(), large=FakeBatcher()) as client:

        async def tier_of(text: str) -> str:
            return (await collect(client, said(text, "a"))).accepted.tier

        assert await tier_of(HARD) == "large"
        assert await tier_of("Thank you!") == "small"
        assert await tier_of("Go on.") == "large", "thanks end nothing"
        assert await tier_of("What is the capital of France?") == "small"
        assert await tier_of("And of Spain?") == "small", "it continues the other topic"


LAST = ["Go on.", "Why?", "Thanks!", "And of Spain?", "Who wrote Hamlet?", HARD, "हाँ"]


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("topic", [HARD, "What is the capital of France?"])
async def test_the_whole_text_and_a_session_with_the_last_turn_are_routed_alike(
    topic: str, last: str
) -> None:
    async with routed({"thresholds": "0.4"}, small=FakeBatcher(), large=FakeBatcher()) as client:
        for text in (topic, "Can you explain that?"):
            await collect(client, said(text, "a"))
        remembered = await client.explain(said(last, "a"))
        whole = await client.explain(
            conversation(topic, "It is so.", "Can you explain that?", "Because of this.", last)
        )

    assert whole.tier == remembered.tier
    assert abs(whole.score - remembered.score) < 0.02


async def test_a_conversation_needs_no_session_to_stay_on_its_tier() -> None:
    async with routed({"thresholds": "0.4"}, small=FakeBatcher(), large=FakeBatcher()) as client:
        answer = await collect(client, conversation(HARD, "Here is a sketch. Shall I write it out?", "Yes"))
        alone = await collect(client, chat("Yes"))

    assert answer.accepted.tier == "large"
    assert alone.accepted.tier == "small"


def conversation(*texts: str) -> pb.GenerateRequest:
    """Return a request with turns of the user and the assistant by turns."""
    request = pb.GenerateRequest()
    for place, text in enumerate(texts):
        request.chat.messages.add(role="assistant" if place % 2 else "user", content=text)
    return request


async def test_an_idle_conversation_starts_again() -> None:
    settings = {"thresholds": "0.4", "session_idle_seconds": 0}
    async with routed(settings, small=FakeBatcher(), large=FakeBatcher()) as client:
        await collect(client, said(HARD, "a"))
        assert (await client.explain(said("Go on.", "a"))).tier == "small"
