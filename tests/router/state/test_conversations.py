"""Conversations keep the tier that they have reached, for a limited time and in limited number."""

from __future__ import annotations

from headrace.router.state.conversations import Conversations


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
