"""Conversations keep the tier that they have reached, for a limited time and in limited number."""

from __future__ import annotations

from headrace.client import chat
from headrace.router.state.conversations import Conversations
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect
from tests.router.drafts import EASY, HARD
from tests.router.fake_batchers import FakeBatcher, routed


def test_a_conversation_keeps_its_tier_until_it_has_been_idle() -> None:
    conversations = Conversations(idle_seconds=60)
    conversations.record("tenant", "talk", "large", 0.0)

    assert conversations.reached("tenant", "talk", 60.0) == "large"
    assert conversations.reached("tenant", "talk", 60.1) == ""
    assert conversations.reached("other", "talk", 1.0) == "", "session ids are the tenant's own"
    assert conversations.reached("tenant", "", 1.0) == ""


def test_no_tenants_conversations_are_forgotten_for_anothers_new_ones() -> None:
    conversations = Conversations(limit=100)
    for place in range(5):
        conversations.record("honest", str(place), "large", 0.0)
    for place in range(10_000):
        conversations.record("flood", str(place), "small", 1.0)

    assert len(conversations) == 100
    assert [conversations.reached("honest", str(place), 2.0) for place in range(5)] == ["large"] * 5
    assert conversations.reached("flood", "9999", 2.0) == "small"
    assert conversations.reached("flood", "0", 2.0) == ""


def test_a_flood_of_tenants_takes_from_those_that_hold_most_first() -> None:
    conversations = Conversations(limit=100)
    for place in range(60):
        conversations.record("busy", str(place), "large", 0.0)
    for place in range(90):
        conversations.record(f"tenant {place}", "talk", "large", 0.0)

    assert sum(bool(conversations.reached("busy", str(place), 1.0)) for place in range(60)) == 10
    assert all(conversations.reached(f"tenant {place}", "talk", 1.0) for place in range(90))


def test_the_least_recently_used_are_forgotten_first() -> None:
    conversations = Conversations(limit=2)
    for place, name in enumerate(["a", "b", "a", "c"]):
        conversations.record("", name, "small", place)
    conversations.record("", "", "small", 5)

    assert len(conversations) == 2
    assert [conversations.reached("", name, 5) for name in "abc"] == ["small", "", "small"]


async def test_a_conversation_moves_only_to_larger_tiers() -> None:
    def said(text: str, session: str, tenant: str = "") -> pb.GenerateRequest:
        request = chat(text)
        request.routing.session_id = session
        request.routing.tenant = tenant
        return request

    async with routed({"thresholds": "0.4"}, small=FakeBatcher(), large=FakeBatcher()) as client:
        tiers = [
            (await collect(client, request)).accepted.tier
            for request in (said(EASY, "a"), said(HARD, "a"), said(EASY, "a"), said(EASY, "b"))
        ]
        explained = await client.explain(said(EASY, "a"))
        other = await client.explain(said(EASY, "a", tenant="other"))

    assert [tier or "?" for tier in tiers] == ["small", "large", "large", "small"]
    assert "conversation has reached 'large'" in explained.why
    assert other.tier == "small"


async def test_an_idle_conversation_starts_again() -> None:
    request = chat(HARD)
    request.routing.session_id = "a"
    again = chat(EASY)
    again.routing.session_id = "a"
    settings = {"thresholds": "0.4", "session_idle_seconds": 0}
    async with routed(settings, small=FakeBatcher(), large=FakeBatcher()) as client:
        await collect(client, request)
        assert (await client.explain(again)).tier == "small"
