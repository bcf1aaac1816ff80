"""Conversations keep the tier that they have reached, and are forgotten in the end."""

from __future__ import annotations

from headrace.router.sessions import Sessions


def test_a_conversation_keeps_its_tier_until_it_has_been_idle() -> None:
    sessions = Sessions(idle_seconds=60)
    sessions.note("tenant", "talk", "large", 0.0)

    assert sessions.reached("tenant", "talk", 60.0) == "large"
    assert sessions.reached("tenant", "talk", 60.1) == ""
    assert sessions.reached("other", "talk", 1.0) == "", "session ids are the tenant's own"
    assert sessions.reached("tenant", "", 1.0) == ""


def test_those_used_longest_ago_are_forgotten_first() -> None:
    sessions = Sessions(limit=2)
    for place, name in enumerate(["a", "b", "a", "c"]):
        sessions.note("", name, "small", place)
    sessions.note("", "", "small", 5)

    assert len(sessions) == 2
    assert [sessions.reached("", name, 5) for name in "abc"] == ["small", "", "small"]
