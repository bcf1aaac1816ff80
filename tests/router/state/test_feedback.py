"""Only the tenant of a request rates its answer, once, and no tenant displaces another's answers."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from headrace import errors
from headrace.client import Client, chat
from headrace.router.__main__ import router
from headrace.router.settings import Settings
from headrace.router.state.feedback import AnswerRecord, Feedback
from headrace.router.state.quota import Quota
from headrace.router.state.tenant_memory import TenantMemory
from headrace.runtime.serving.server import StartFailed
from headrace.v1 import routing_service_pb2 as routing
from tests.harness import collect, eventually
from tests.router.drafts import EASY, HARD
from tests.router.fake_batchers import FakeBatcher, routed


async def ask(client: Client, text: str, *, id: str = "q1", tenant: str = "") -> None:
    request = chat(text)
    request.request_id = id
    request.routing.tenant = tenant
    await collect(client, request)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_two_tenants_that_use_one_request_id_rate_their_own_answers(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=FakeBatcher(), large=FakeBatcher()) as client:
        await ask(client, "of A", tenant="A")
        await ask(client, "of B", tenant="B")
        await client.feedback("q1", ok=True, tenant="A")
        await client.feedback("q1", ok=False, tenant="B")

    first, second = rows(path)
    assert (first["tenant"], first["prompt"], first["small_ok"]) == ("A", "of A", 1.0)
    assert (second["tenant"], second["prompt"], second["small_ok"]) == ("B", "of B", 0.0)
    assert first["id"] == second["id"] == "q1"
    assert first["answer"] != second["answer"], "the server's own ids differ"


@pytest.mark.parametrize("tenant", ["", "B"])
async def test_nobody_rates_what_another_tenant_asked(tmp_path: Path, tenant: str) -> None:
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=FakeBatcher(), large=FakeBatcher()) as client:
        await ask(client, "of A", tenant="A")
        with pytest.raises(errors.UnknownRequest) as others:
            await client.feedback("q1", ok=False, tenant=tenant)
        with pytest.raises(errors.UnknownRequest) as none:
            await client.feedback("q2", ok=False, tenant=tenant)

    assert rows(path) == []
    assert others.value.message == none.value.message.replace("q2", "q1"), (
        "the error does not reveal that the request exists"
    )


async def test_a_caller_without_a_tenant_rates_by_its_request_id_alone(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=FakeBatcher(), large=FakeBatcher()) as client:
        await ask(client, "Hello!")
        await ask(client, "Hello!")  # as one who tries a command again
        said = await client.feedback("q1", ok=True)
        await ask(client, "And now?")
        await client.feedback("q1", ok=False)

    assert said.kept
    assert [(row["prompt"], row["small_ok"]) for row in rows(path)] == [("Hello!", 1.0), ("And now?", 0.0)]


async def test_of_two_prompts_without_a_tenant_under_one_id_none_is_rated(tmp_path: Path) -> None:
    """They may belong to two callers, and an outcome for the wrong prompt would be wrong training data."""
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=FakeBatcher(), large=FakeBatcher()) as client:
        for text in ("of one", "of another", "of another"):
            await ask(client, text)
        with pytest.raises(errors.InvalidRequest, match="an id of its own"):
            await client.feedback("q1", ok=True)

    assert rows(path) == []


async def test_the_last_answer_of_a_tenants_request_id_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=FakeBatcher(), large=FakeBatcher()) as client:
        await ask(client, "first", tenant="A")
        await ask(client, "second", tenant="A")
        await client.feedback("q1", ok=True, tenant="A")

    assert [row["prompt"] for row in rows(path)] == ["second"]


async def test_a_request_has_one_outcome(tmp_path: Path, count: Callable[..., float]) -> None:
    before = count("headrace.feedback")
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=FakeBatcher(), large=FakeBatcher()) as client:
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
    served = "headrace.v1.RoutingService/Feedback"

    def ended() -> list[ReadableSpan]:
        return [s for s in spans.get_finished_spans() if (s.name, s.kind) == (served, SpanKind.SERVER)]

    async with routed(
        {"feedback": tmp_path / "feedback.jsonl"}, small=FakeBatcher(), large=FakeBatcher()
    ) as client:
        await ask(client, "Hello!")
        await client.feedback("q1", ok=True)
        with pytest.raises(errors.AlreadyRated):
            await client.feedback("q1", ok=False)
        await eventually(lambda: len(ended()) == 2)

    refused = [s for s in ended() if (s.attributes or {}).get("error.type")]
    assert [(span.name, span.status.status_code) for span in refused] == [(served, StatusCode.UNSET)]


async def test_outcomes_that_come_at_once_are_one(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    feedback = Feedback(path)
    feedback.remember("q1", AnswerRecord("small", 0.5, "prompt"))

    assert all(await asyncio.gather(*(feedback.rate("q1", "small", 1.0) for _ in range(20))))
    assert len(rows(path)) == 1


async def test_a_tenant_has_a_quota_and_others_have_theirs(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    settings = {"feedback": path, "feedback_per_minute": 3}
    async with routed(settings, small=FakeBatcher(), large=FakeBatcher()) as client:
        for place in range(4):
            await ask(client, f"prompt {place}", id=str(place), tenant="A")
        await ask(client, "of B", tenant="B")
        for place in range(3):
            await client.feedback(str(place), ok=True, tenant="A")
        with pytest.raises(errors.FeedbackQuota, match="'A' exhausted") as caught:
            await client.feedback("3", ok=True, tenant="A")
        await client.feedback("q1", ok=True, tenant="B")

    assert 0 < (caught.value.retry_after or 0) <= 20
    assert [row["tenant"] for row in rows(path)] == ["A", "A", "A", "B"]


async def test_no_tenant_fills_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    feedback = Feedback(path, max_bytes=8000, share=0.25)
    feedback.remember("q1", AnswerRecord("small", 0.5, "honest"), tenant="honest")
    await feedback.rate("q1", "small", 1.0, tenant="honest")
    refused = 0
    for place in range(100):
        feedback.remember(str(place), AnswerRecord("small", 0.5, "x" * 300), tenant="flood")
        try:
            await feedback.rate(str(place), "small", 0.0, tenant="flood")
        except errors.FeedbackQuota:
            refused += 1

    assert refused > 90
    assert rows(path)[0]["tenant"] == "honest"


async def test_no_tenants_answers_are_forgotten_for_anothers(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "feedback.jsonl", max_bytes=10_000, remembered=100)
    feedback.remember("q1", AnswerRecord("small", 0.5, "honest"), tenant="honest")
    for place in range(1000):
        feedback.remember(str(place), AnswerRecord("small", 0.5, "x" * (place % 900)), tenant="flood")

    assert feedback.recall("q1", tenant="honest").prompt == "honest"
    with pytest.raises(errors.UnknownRequest):
        feedback.recall("1", tenant="flood")


@pytest.mark.parametrize("field", ["request_id", "tier", "tenant"])
async def test_long_names_are_rejected_with_short_messages(field: str) -> None:
    given = {"request_id": "q1", "tier": "small", "tenant": ""} | {field: "x" * 1_000_000}
    async with routed(small=FakeBatcher(), large=FakeBatcher()) as client:
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
def test_a_tenant_memory_keeps_its_limits_and_the_tenant_with_the_most_loses(
    puts: list[tuple[str, str, int]], limit: int, most: int
) -> None:
    memory: TenantMemory[int] = TenantMemory(limit, weight=most)
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
def test_a_quota_allows_its_rate_and_its_delay_suffices(
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
        assert quota.wait("b", most, now) == 0, "other tenants have their own"


async def test_feedback_writes_prompt_and_outcome_to_the_file(
    tmp_path: Path, count: Callable[..., float]
) -> None:
    before = count("headrace.feedback", tier="small", verdict="good")
    path = tmp_path / "feedback.jsonl"
    settings = {"feedback": path, "thresholds": "0.4"}
    async with routed(settings, small=FakeBatcher(), large=FakeBatcher()) as client:
        answer = await collect(client, chat(EASY))
        id = answer.accepted.request_id
        said = await client.feedback(id, ok=True)
        assert (said.kept, said.tier) == (True, "small")
        hard = await collect(client, chat(HARD))
        await client.feedback(hard.accepted.request_id, quality=0.25, tier="large")

        with pytest.raises(errors.UnknownRequest, match="no request 'who'"):
            await client.feedback("who", ok=True)
        with pytest.raises(errors.UnknownTier):
            await client.feedback(id, ok=True, tier="huge")
        with pytest.raises(errors.InvalidRequest, match="'large' did not answer"):
            await client.feedback(id, ok=True, tier="large")
        with pytest.raises(errors.InvalidRequest, match="0 to 1"):
            await client.feedback(id, quality=2)

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [EASY, HARD]
    assert (rows[0]["small_ok"], rows[1]["large_ok"]) == (1.0, 0.25)
    assert path.stat().st_mode & 0o077 == 0, "only the owner may read prompts"
    assert count("headrace.feedback", tier="small", verdict="good") == before + 1


async def test_without_a_file_no_prompt_is_stored() -> None:
    async with routed(small=FakeBatcher(), large=FakeBatcher()) as client:
        answer = await collect(client, chat(EASY))
        said = await client.feedback(answer.accepted.request_id, ok=False)

    assert not said.kept
    feedback = Feedback()
    feedback.remember("a", AnswerRecord("small", 0.5, "a secret"))
    assert feedback.recall("a").prompt == ""


async def test_the_feedback_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    feedback = Feedback(path, max_bytes=1000, remembered=3)
    for place in range(50):
        feedback.remember(str(place), AnswerRecord("small", 0.5, f"prompt {place}"))
        await feedback.rate(str(place), "small", 1.0)

    assert sorted(os.listdir(tmp_path)) == ["feedback.jsonl", "feedback.jsonl.1"]
    assert all(os.stat(tmp_path / name).st_size <= 1000 for name in os.listdir(tmp_path))
    assert json.loads(path.read_text().splitlines()[-1])["prompt"] == "prompt 49"
    with pytest.raises(errors.UnknownRequest):
        feedback.recall("46")


async def test_the_total_size_of_stored_prompts_is_bounded(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "feedback.jsonl", max_bytes=1000)
    for place in range(5):
        feedback.remember(str(place), AnswerRecord("small", 0.5, "x" * 400))
    feedback.remember("4", AnswerRecord("small", 0.5, "x" * 400))
    feedback.remember("huge", AnswerRecord("small", 0.5, "x" * 2000))

    assert feedback.recall("3").prompt == "x" * 400
    assert await feedback.rate("3", "small", 1.0)
    assert not await feedback.rate("huge", "small", 1.0), "it is too long for the file"
    with pytest.raises(errors.UnknownRequest):
        feedback.recall("2")


async def test_a_full_disk_leaves_no_partial_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=FakeBatcher(), large=FakeBatcher()) as client:
        first, id = [(await collect(client, chat(EASY))).accepted.request_id for _ in range(2)]
        await client.feedback(first, ok=True)
        whole = path.read_bytes()
        with monkeypatch.context() as patched:
            write = os.write
            patched.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
            with pytest.raises(errors.InternalError, match="feedback file"):
                await client.feedback(id, ok=True)
        assert path.read_bytes() == whole
        await client.feedback(id, ok=True)

    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2


async def test_rows_are_written_one_by_one_even_if_a_caller_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feedback = Feedback(tmp_path / "feedback.jsonl")
    feedback.remember("a", AnswerRecord("small", 0.5, "prompt"))
    feedback.remember("b", AnswerRecord("small", 0.5, "prompt"))
    began, go, write = threading.Semaphore(0), threading.Event(), os.write

    def slow(handle: int, data: bytes) -> int:
        began.release()
        go.wait(20)
        return write(handle, data)

    monkeypatch.setattr(os, "write", slow)
    leaving = asyncio.create_task(feedback.rate("a", "small", 1.0))
    assert await asyncio.to_thread(began.acquire, timeout=20)
    leaving.cancel()
    await asyncio.wait([leaving])
    staying = asyncio.create_task(feedback.rate("b", "small", 0.0))
    together = await asyncio.to_thread(began.acquire, timeout=0.2)
    go.set()

    assert await staying
    assert not together


async def test_grpc_callers_must_give_an_outcome() -> None:
    async with routed(small=FakeBatcher(), large=FakeBatcher()) as client:
        with pytest.raises(errors.InvalidRequest, match="no outcome"):
            stub = (await client._endpoint(5)).routing
            await client._unary(stub.Feedback(routing.FeedbackRequest(request_id="a"), timeout=5))


async def test_a_router_does_not_start_with_an_unwritable_feedback_file(tmp_path: Path) -> None:
    """Otherwise the first report of an outcome would fail."""
    nowhere = tmp_path / "nowhere" / "feedback.jsonl"

    with pytest.raises(StartFailed, match=f"{nowhere} cannot be written: No such file"):
        async with router(Settings(port=0, tiers="small=127.0.0.1:1", feedback=nowhere)):
            pass
