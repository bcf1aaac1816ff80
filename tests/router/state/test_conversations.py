"""Conversations keep the tier that they have reached, and are forgotten in the end."""

from __future__ import annotations

from headrace.router.state.conversations import Sessions


def test_a_conversation_keeps_its_tier_until_it_has_been_idle() -> None:
    sessions = Sessions(idle_seconds=60)
    sessions.note("tenant", "talk", "large", 0.0)

    assert sessions.reached("tenant", "talk", 60.0) == "large"
    assert sessions.reached("tenant", "talk", 60.1) == ""
    assert sessions.reached("other", "talk", 1.0) == "", "session ids are the tenant's own"
    assert sessions.reached("tenant", "", 1.0) == ""


def test_no_tenants_conversations_are_forgotten_for_anothers_new_ones() -> None:
    sessions = Sessions(limit=100)
    for place in range(5):
        sessions.note("honest", str(place), "large", 0.0)
    for place in range(10_000):
        sessions.note("flood", str(place), "small", 1.0)

    assert len(sessions) == 100
    assert [sessions.reached("honest", str(place), 2.0) for place in range(5)] == ["large"] * 5
    assert sessions.reached("flood", "9999", 2.0) == "small"
    assert sessions.reached("flood", "0", 2.0) == ""


def test_a_flood_of_tenants_takes_from_those_that_hold_most_first() -> None:
    sessions = Sessions(limit=100)
    for place in range(60):
        sessions.note("busy", str(place), "large", 0.0)
    for place in range(90):
        sessions.note(f"tenant {place}", "talk", "large", 0.0)

    assert sum(bool(sessions.reached("busy", str(place), 1.0)) for place in range(60)) == 10
    assert all(sessions.reached(f"tenant {place}", "talk", 1.0) for place in range(90))


def test_those_used_longest_ago_are_forgotten_first() -> None:
    sessions = Sessions(limit=2)
    for place, name in enumerate(["a", "b", "a", "c"]):
        sessions.note("", name, "small", place)
    sessions.note("", "", "small", 5)

    assert len(sessions) == 2
    assert [sessions.reached("", name, 5) for name in "abc"] == ["small", "", "small"]
