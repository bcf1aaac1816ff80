"""Hostile and careless callers do not affect others."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.faults.fleet import Fleet
from tests.hostile.confine import confined, manifest_limit
from tests.hostile.conftest import Attack

pytestmark = [pytest.mark.faults, pytest.mark.quiet]

BUSY = {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
CUT = {"reset", "closed"}
# Statuses of invalid requests: never INTERNAL or UNKNOWN, which are our faults, and never CANCELLED.
REFUSED = {"INVALID_ARGUMENT", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "NOT_FOUND", "DEADLINE_EXCEEDED"}

FLOODS: dict[str, set[str]] = {
    "streams_at_once": BUSY | CUT,  # gRPC resets streams beyond its limit
    "rapid_reset": {"sent"},
    "invalid_requests": {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"},
    "long_prompts": {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"} | CUT,
    "compressed": {"UNIMPLEMENTED"} | CUT,
    "almost_whole_messages": {"RESOURCE_EXHAUSTED", "open"} | CUT,
    "header_bombs": {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "open"} | CUT,
    "long_headers": {"OK", "RESOURCE_EXHAUSTED"} | CUT,
    "endless_continuation": {"open"} | CUT,
    "control_frames": {"sent"},
    "going_away": {"sent"},
    "silent_connections": {"sent", "refused"},
    "watchers": {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"} | CUT,
    "sessions_without_end": BUSY,
    "feedback_without_end": {"NOT_FOUND", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"},
}
FUZZ: dict[str, set[str]] = {
    "any_contents_to_every_method": {"OK", "open"} | REFUSED,
    "nested_messages": {"OK"} | REFUSED,  # 50 levels are few enough
    "any_bytes_to_every_method": {"OK", "open"} | REFUSED,
    "almost_valid_requests": {"OK"} | REFUSED,
    "any_frames": {"sent"},
    "streams_that_stay": {"OK", "open"} | REFUSED,
}
RUN: dict[str, set[str]] = {
    "idle_run_streams": {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "open"},
    "urgent_sequences_beyond_credit": {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"},
    "sequences_that_cannot_be": {"OK", "INVALID_ARGUMENT"},
    "run_out_of_order": {"OK", "INVALID_ARGUMENT"},
    "unread_pings": {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "open"},
}
MULTIPLEX: dict[str, set[str]] = {
    "opens_and_cancels": {"sent", "OK"},
    "equal_handles": {"INVALID_ARGUMENT"},
    "too_many_opens": {"INVALID_ARGUMENT"},
    "credit_without_end": {"sent", "OK"},
    "pings_without_end": {"sent", "open"},
    "unread_errors": {"sent"},
    "unread_answers": {"open"},
    "idle_streams": {"open", "RESOURCE_EXHAUSTED"} | CUT,
}


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_at_the_router_does_not_affect_others(attack: Attack, name: str) -> None:
    row = await attack("router", name, seconds=0.8)

    assert row.outcomes.keys() <= FLOODS[name]


@pytest.mark.parametrize("service", ["router", "batcher"])
@pytest.mark.parametrize("name", MULTIPLEX)
async def test_abuse_of_a_shared_stream_does_not_affect_others(
    attack: Attack, service: str, name: str
) -> None:
    row = await attack(service, name, seconds=1.0)

    assert row.outcomes.keys() <= MULTIPLEX[name]


@pytest.mark.parametrize("service", ["router", "batcher", "worker"])
@pytest.mark.parametrize("name", FUZZ)
async def test_invalid_requests_get_a_status_of_their_own(attack: Attack, service: str, name: str) -> None:
    row = await attack(service, name, seconds=0.8)

    assert row.outcomes.keys() <= FUZZ[name]


@pytest.mark.parametrize("service", ["router", "worker"])
async def test_an_invalid_call_ends_no_other(attack: Attack, service: str) -> None:
    row = await attack(service, "odd_calls", seconds=1.0)

    # gRPC's own statuses for a truncated message (CANCELLED, INTERNAL) and for no message.
    assert row.outcomes.keys() - {"http 415"} <= {"OK", "CANCELLED", "INTERNAL", "UNKNOWN"} | REFUSED | CUT


@pytest.mark.parametrize("name", RUN)
async def test_a_worker_trusts_no_batcher(attack: Attack, name: str) -> None:
    row = await attack("worker", name, seconds=2.0)

    ended = {outcome for outcome in row.outcomes if not outcome.startswith("read ")}
    assert ended <= RUN[name] | {"cut"}


async def test_each_service_survives_with_the_memory_of_its_manifest(mesh: Fleet, attack: Attack) -> None:
    """All attacks on memory at once, within the memory limits of the manifests."""
    heavy = ("long_prompts", "compressed", "almost_whole_messages", "header_bombs", "streams_at_once")
    with ExitStack() as stack:
        how = {
            stack.enter_context(confined(child, manifest_limit(child.name.rstrip("0123456789"))))
            for child in mesh.children
        }
        for service in ("router", "batcher"):
            note = f", in {', '.join(sorted(how))}"
            # Five attackers and three services share one machine: only availability is checked, not latency.
            row = await attack(service, *heavy, seconds=2.5, note=note, prompt=False)

            assert not row.outcomes.keys() & {"INTERNAL", "UNKNOWN", "CANCELLED"}
