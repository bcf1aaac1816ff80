"""Only the tenant that asked rates an answer, once, and no tenant takes another one's place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from headrace import errors
from headrace.client import Client, chat
from headrace.router.state.feedback import Answered, Feedback
from headrace.router.state.quota import Quota
from headrace.router.state.tenant_memory import Memory
from tests.harness import collect, eventually
from tests.router.fake_batchers import Front, routed


async def ask(client: Client, text: str, *, id: str = "q1", tenant: str = "") -> None:
    request = chat(text)
    request.request_id = id
    request.routing.tenant = tenant
    await collect(client, request)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_two_tenants_that_use_one_request_id_rate_their_own_answers(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=Front(), large=Front()) as client:
        await ask(client, "of A", tenant="A")
        await ask(client, "of B", tenant="B")
        await client.feedback("q1", ok=True, tenant="A")
        await client.feedback("q1", ok=False, tenant="B")

    first, second = rows(path)
    assert (first["tenant"], first["prompt"], first["small_ok"]) == ("A", "of A", 1.0)
    assert (second["tenant"], second["prompt"], second["small_ok"]) == ("B", "of B", 0.0)
    assert first["id"] == second["id"] == "q1"
    assert first["answer"] != second["answer"], "an id of the server's own tells them apart"


@pytest.mark.parametrize("tenant", ["", "B"])
async def test_nobody_rates_what_another_tenant_asked(tmp_path: Path, tenant: str) -> None:
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=Front(), large=Front()) as client:
        await ask(client, "of A", tenant="A")
        with pytest.raises(errors.UnknownRequest) as others:
            await client.feedback("q1", ok=False, tenant=tenant)
        with pytest.raises(errors.UnknownRequest) as none:
            await client.feedback("q2", ok=False, tenant=tenant)

    assert rows(path) == []
    assert others.value.message == none.value.message.replace("q2", "q1"), "nor learns that it was asked"


async def test_a_caller_without_a_tenant_rates_by_its_request_id_alone(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=Front(), large=Front()) as client:
        await ask(client, "Hello!")
        await ask(client, "Hello!")  # as one who tries a command again
        said = await client.feedback("q1", ok=True)
        await ask(client, "And now?")
        await client.feedback("q1", ok=False)

    assert said.kept
    assert [(row["prompt"], row["small_ok"]) for row in rows(path)] == [("Hello!", 1.0), ("And now?", 0.0)]


async def test_of_two_prompts_without_a_tenant_under_one_id_none_is_rated(tmp_path: Path) -> None:
    """They may be two callers', and a verdict beside the wrong prompt teaches what is wrong."""
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=Front(), large=Front()) as client:
        for text in ("of one", "of another", "of another"):
            await ask(client, text)
        with pytest.raises(errors.InvalidRequest, match="an id of its own"):
            await client.feedback("q1", ok=True)

    assert rows(path) == []


async def test_the_last_answer_of_a_tenants_request_id_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=Front(), large=Front()) as client:
        await ask(client, "first", tenant="A")
        await ask(client, "second", tenant="A")
        await client.feedback("q1", ok=True, tenant="A")

    assert [row["prompt"] for row in rows(path)] == ["second"]


async def test_a_request_has_one_outcome(tmp_path: Path, count: Callable[..., float]) -> None:
    before = count("headrace.feedback")
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=Front(), large=Front()) as client:
        await ask(client, "Hello!")
        said = [await client.feedback("q1", ok=True) for _ in range(50)]
        with pytest.raises(errors.AlreadyRated, match="rated before, with 1"):
            await client.feedback("q1", quality=0.5)

    assert {(one.kept, one.tier) for one in said} == {(True, "small")}
    assert len(rows(path)) == 1
    assert count("headrace.feedback") == before + 1


async def test_a_second_outcome_is_no_error_of_the_server(
    tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    async with routed({"feedback": tmp_path / "feedback.jsonl"}, small=Front(), large=Front()) as client:
        await ask(client, "Hello!")
        await client.feedback("q1", ok=True)
        with pytest.raises(errors.AlreadyRated):
            await client.feedback("q1", ok=False)
        served = "headrace.v1.RoutingService/Feedback"
        await eventually(lambda: [span.name for span in spans.get_finished_spans()].count(served) == 2)

    refused = [s for s in spans.get_finished_spans() if (s.attributes or {}).get("error.type")]
    assert [(span.name, span.status.status_code) for span in refused] == [(served, StatusCode.UNSET)]


async def test_outcomes_that_come_at_once_are_one(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    feedback = Feedback(path)
    feedback.remember("q1", Answered("small", 0.5, "prompt"))

    assert all(await asyncio.gather(*(feedback.keep("q1", "small", 1.0) for _ in range(20))))
    assert len(rows(path)) == 1


async def test_a_tenant_has_a_quota_and_others_have_theirs(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    settings = {"feedback": path, "feedback_per_minute": 3}
    async with routed(settings, small=Front(), large=Front()) as client:
        for place in range(4):
            await ask(client, f"prompt {place}", id=str(place), tenant="A")
        await ask(client, "of B", tenant="B")
        for place in range(3):
            await client.feedback(str(place), ok=True, tenant="A")
        with pytest.raises(errors.FeedbackQuota, match="'A' is used up") as caught:
            await client.feedback("3", ok=True, tenant="A")
        await client.feedback("q1", ok=True, tenant="B")

    assert 0 < (caught.value.retry_after or 0) <= 20
    assert [row["tenant"] for row in rows(path)] == ["A", "A", "A", "B"]


async def test_no_tenant_fills_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    feedback = Feedback(path, max_bytes=8000, share=0.25)
    feedback.remember("q1", Answered("small", 0.5, "honest"), tenant="honest")
    await feedback.keep("q1", "small", 1.0, tenant="honest")
    refused = 0
    for place in range(100):
        feedback.remember(str(place), Answered("small", 0.5, "x" * 300), tenant="flood")
        try:
            await feedback.keep(str(place), "small", 0.0, tenant="flood")
        except errors.FeedbackQuota:
            refused += 1

    assert refused > 90
    assert rows(path)[0]["tenant"] == "honest"


async def test_no_tenants_answers_are_forgotten_for_anothers(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "feedback.jsonl", max_bytes=10_000, remembered=100)
    feedback.remember("q1", Answered("small", 0.5, "honest"), tenant="honest")
    for place in range(1000):
        feedback.remember(str(place), Answered("small", 0.5, "x" * (place % 900)), tenant="flood")

    assert feedback.recall("q1", tenant="honest").prompt == "honest"
    with pytest.raises(errors.UnknownRequest):
        feedback.recall("1", tenant="flood")


@pytest.mark.parametrize("field", ["request_id", "tier", "tenant"])
async def test_names_of_any_length_are_refused_shortly(field: str) -> None:
    given = {"request_id": "q1", "tier": "small", "tenant": ""} | {field: "x" * 1_000_000}
    async with routed(small=Front(), large=Front()) as client:
        with pytest.raises(errors.InvalidRequest, match=f"{field} has 1000000 characters") as caught:
            await client.feedback(given["request_id"], ok=True, tier=given["tier"], tenant=given["tenant"])

    assert caught.value.field == field


@given(
    puts=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("123456789"), st.integers(0, 5)), max_size=60
    ),
    limit=st.integers(1, 8),
    most=st.integers(5, 20),
)
def test_a_memory_keeps_its_bounds_and_the_tenant_that_holds_most_pays(
    puts: list[tuple[str, str, int]], limit: int, most: int
) -> None:
    memory: Memory[int] = Memory(limit, weight=most)
    for tenant, name, weight in puts:
        held = {
            (one, key): value
            for one in "abc"
            for key in "123456789"
            if (value := memory.get(one, key)) is not None
        }
        shares = {
            one: sum(1 / limit + value / most for (owner, _), value in held.items() if owner == one)
            for one in "abc"
        }
        memory.put(tenant, name, weight, weight)
        lost = {owner for (owner, key) in held if memory.get(owner, key) is None}
        now = [memory.get(one, key) for one in "abc" for key in "123456789"]
        kept = [value for value in now if value is not None]

        assert len(memory) == len(kept) <= limit
        assert sum(kept) <= most
        for owner in lost - {tenant}:
            assert shares[owner] + 1 / limit + 5 / most >= max(shares.values()) - 1e-9


@given(
    takes=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 4)), max_size=60),
    most=st.integers(1, 10),
    seconds=st.floats(1, 60),
)
def test_a_quota_lets_through_what_it_says_and_its_delay_suffices(
    takes: list[tuple[float, int]], most: int, seconds: float
) -> None:
    quota, now, taken = Quota(most, seconds), 0.0, 0.0
    for pause, amount in takes:
        now += pause
        if (wait := quota.wait("a", amount, now)) > 0:
            now += wait + 1e-6
            assert quota.wait("a", amount, now) == 0
        quota.take("a", amount, now)
        taken += min(amount, most)

        assert taken <= most + now * most / seconds + 1e-6
        assert quota.wait("b", most, now) == 0, "others have their own"
