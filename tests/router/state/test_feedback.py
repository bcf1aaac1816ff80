"""Only the tenant of a request rates its answer, once, and no tenant displaces another's answers."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
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
from headrace.router.state.feedback import MAX_CHARACTERS, AnswerRecord, Feedback
from headrace.router.state.quota import Quota
from headrace.router.state.tenant_memory import TenantMemory
from headrace.routing.scoring.conversation import Turn, turns_of_row
from headrace.routing.scoring.score import fingerprint
from headrace.routing.scoring.scorer import load
from headrace.runtime.security.identity import ANONYMOUS, Identity
from headrace.runtime.serving.server import StartFailed
from headrace.v1 import routing_service_pb2 as routing
from tests.harness import collect, eventually
from tests.router.drafts import EASY, HARD
from tests.router.fake_batchers import FakeBatcher, routed


async def ask(client: Client, text: str, *, id: str = "q1", tenant: str = "") -> str:
    """Send a prompt; return the id of the answer."""
    request = chat(text)
    request.request_id = id
    request.routing.tenant = tenant
    return (await collect(client, request)).accepted.answer_id


def record(name: str, text: str, *, request_id: str = "") -> AnswerRecord:
    return AnswerRecord(name, request_id or name, "small", 0.5, [Turn("user", text)])


async def rate(feedback: Feedback, name: str, quality: float, tenant: str = "") -> bool:
    return await feedback.rate(
        feedback.recall(answer_id=name, tenant=tenant), "small", quality, tenant=tenant
    )


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


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("tenant", ["", "A"])
async def test_of_two_prompts_under_one_request_id_none_is_rated(
    tmp_path: Path, tenant: str, kept: bool
) -> None:
    """They may belong to two callers, and an outcome for the wrong prompt would be wrong training data.

    Without a feedback file, it would count in the decision log and for a canary.
    """
    path = tmp_path / "feedback.jsonl"
    settings = {"feedback": path} if kept else {}
    async with routed(settings, small=FakeBatcher(), large=FakeBatcher()) as client:
        for text in ("of one", "of another", "of another"):
            await ask(client, text, tenant=tenant)
        with pytest.raises(errors.InvalidRequest, match="by its answer_id") as caught:
            await client.feedback("q1", ok=True, tenant=tenant)

    assert caught.value.field == "answer_id"
    assert not kept or rows(path) == []


async def test_an_answer_id_means_one_answer_whatever_the_ids_of_requests(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=FakeBatcher(), large=FakeBatcher()) as client:
        first, second = await ask(client, "first"), await ask(client, "second")
        await client.feedback(answer_id=second, ok=False)
        await client.feedback("q1", answer_id=first, ok=True)
        with pytest.raises(errors.InvalidRequest, match="leave request_id out"):
            await client.feedback("q2", answer_id=first, ok=True)
        with pytest.raises(errors.UnknownRequest, match="no answer"):
            await client.feedback(answer_id=first[:-1] + "x", ok=True)

    assert [(row["prompt"], row["answer"], row["small_ok"]) for row in rows(path)] == [
        ("second", second, 0.0),
        ("first", first, 1.0),
    ]


async def test_nobody_rates_an_answer_of_another_tenant_by_its_id(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=FakeBatcher(), large=FakeBatcher()) as client:
        answer = await ask(client, "of A", tenant="A")
        for tenant in ("", "B"):
            with pytest.raises(errors.UnknownRequest):
                await client.feedback(answer_id=answer, ok=False, tenant=tenant)

    assert rows(path) == []


async def test_a_row_shows_where_its_outcome_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    turns = [("user", "Hi!"), ("assistant", "Hello!"), ("user", "Say it in German.")]
    async with routed({"feedback": path}, small=FakeBatcher(), large=FakeBatcher()) as client:
        request = chat(turns)
        request.routing.tenant = "A"
        answer = await collect(client, request)
        await client.feedback(answer_id=answer.accepted.answer_id, quality=0.5, tenant="A")

    (row,) = rows(path)
    assert row["messages"] == [{"role": role, "content": content} for role, content in turns]
    assert {name: row[name] for name in ("id", "answer", "tenant", "identity", "source", "tier")} == {
        "id": answer.accepted.request_id,
        "answer": answer.accepted.answer_id,
        "tenant": "A",
        "identity": "anonymous",
        "source": "caller",
        "tier": "small",
    }
    assert row["scorer"] == fingerprint(load())
    assert row["score"] == pytest.approx(answer.accepted.score, abs=1e-6)
    assert abs(row["time"] - time.time()) < 600
    assert [turn.text for turn in turns_of_row(row)] == [content for _, content in turns]


async def test_callers_without_credentials_who_invent_tenants_have_one_quota(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "feedback.jsonl", per_minute=5, max_bytes=10_000_000, share=0.25)
    known = Identity(name="key-1", scopes=ANONYMOUS.scopes, tenant="honest")
    accepted, refused = 0, set()
    for place in range(100):
        tenant = f"invented {place}"
        feedback.remember(record("a", "prompt"), tenant=tenant)
        try:
            accepted += await rate(feedback, "a", 0.0, tenant)
        except errors.FeedbackQuota as error:
            refused.add(error.message)
    feedback.remember(record("a", "prompt"), tenant="honest")
    answer = feedback.recall(answer_id="a", tenant="honest")

    assert 20 <= accepted <= 30, "four quotas, and what is added while the test runs"
    assert [message[:42] for message in refused] == ["callers without credentials together exhaus"[:42]]
    assert await feedback.rate(answer, "small", 1.0, tenant="honest", rater=known)


async def test_callers_without_credentials_fill_half_the_file_at_most(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    feedback = Feedback(path, max_bytes=20_000, share=0.25)
    for place in range(100):
        feedback.remember(record("a", "x" * 500), tenant=f"invented {place}")
        with suppress(errors.FeedbackQuota):
            await rate(feedback, "a", 0.0, f"invented {place}")

    assert 8_000 < path.stat().st_size <= 11_000


async def test_very_long_turns_are_not_stored(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "feedback.jsonl")
    feedback.remember(record("long", "x" * MAX_CHARACTERS))

    assert feedback.recall(answer_id="long").turns == ()
    assert not await rate(feedback, "long", 1.0)


@given(
    asked=st.lists(
        st.tuples(st.sampled_from("AB"), st.sampled_from("xy"), st.sampled_from("12")), max_size=8
    ),
    named=st.tuples(st.sampled_from("AB"), st.sampled_from("xy")),
)
def test_a_request_id_means_an_answer_of_the_tenant_only_if_it_is_the_only_one(
    asked: list[tuple[str, str, str]], named: tuple[str, str]
) -> None:
    feedback = Feedback(Path(os.devnull))
    for place, (tenant, request_id, text) in enumerate(asked):
        feedback.remember(record(str(place), text, request_id=request_id), tenant=tenant)
    tenant, request_id = named
    texts = {text for owner, id, text in asked if (owner, id) == named}
    try:
        found = feedback.recall(request_id=request_id, tenant=tenant)
    except errors.UnknownRequest:
        assert not texts
    except errors.InvalidRequest:
        assert len(texts) > 1
    else:
        assert {turn.text for turn in found.turns} == texts
        assert asked[int(found.answer_id)][:2] == named


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
    feedback.remember(record("q1", "prompt"))

    assert all(await asyncio.gather(*(rate(feedback, "q1", 1.0) for _ in range(20))))
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
    feedback.remember(record("q1", "honest"), tenant="honest")
    await rate(feedback, "q1", 1.0, tenant="honest")
    refused = 0
    for place in range(100):
        feedback.remember(record(str(place), "x" * 300), tenant="flood")
        try:
            await rate(feedback, str(place), 0.0, tenant="flood")
        except errors.FeedbackQuota:
            refused += 1

    assert refused > 90
    assert rows(path)[0]["tenant"] == "honest"


async def test_no_tenants_answers_are_forgotten_for_anothers(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "feedback.jsonl", max_bytes=10_000, remembered=100)
    feedback.remember(record("q1", "honest"), tenant="honest")
    for place in range(1000):
        feedback.remember(record(str(place), "x" * (place % 900)), tenant="flood")

    assert feedback.recall(answer_id="q1", tenant="honest").turns == [Turn("user", "honest")]
    with pytest.raises(errors.UnknownRequest):
        feedback.recall(answer_id="1", tenant="flood")


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
        with pytest.raises(errors.InvalidRequest, match="'large' did not give answer"):
            await client.feedback(id, ok=True, tier="large")
        with pytest.raises(errors.InvalidRequest, match="names no answer"):
            await client.feedback(ok=True)
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
    feedback.remember(record("a", "a secret"))
    assert feedback.recall(answer_id="a").turns == ()


async def test_the_feedback_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    feedback = Feedback(path, max_bytes=1000, remembered=3)
    for place in range(50):
        feedback.remember(record(str(place), f"prompt {place}"))
        await rate(feedback, str(place), 1.0)

    assert sorted(os.listdir(tmp_path)) == ["feedback.jsonl", "feedback.jsonl.1"]
    assert all(os.stat(tmp_path / name).st_size <= 1000 for name in os.listdir(tmp_path))
    assert json.loads(path.read_text().splitlines()[-1])["prompt"] == "prompt 49"
    with pytest.raises(errors.UnknownRequest):
        feedback.recall(answer_id="46")


async def test_the_total_size_of_stored_prompts_is_bounded(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "feedback.jsonl", max_bytes=1000)
    for place in range(5):
        feedback.remember(record(str(place), "x" * 400))
    feedback.remember(record("4", "x" * 400))
    feedback.remember(record("huge", "x" * 2000))

    assert feedback.recall(answer_id="3").turns == [Turn("user", "x" * 400)]
    assert await rate(feedback, "3", 1.0)
    assert not await rate(feedback, "huge", 1.0), "it is too long for the file"
    with pytest.raises(errors.UnknownRequest):
        feedback.recall(answer_id="2")


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
    feedback.remember(record("a", "prompt"))
    feedback.remember(record("b", "prompt"))
    began, go, write = threading.Semaphore(0), threading.Event(), os.write

    def slow(handle: int, data: bytes) -> int:
        began.release()
        go.wait(20)
        return write(handle, data)

    monkeypatch.setattr(os, "write", slow)
    leaving = asyncio.create_task(rate(feedback, "a", 1.0))
    assert await asyncio.to_thread(began.acquire, timeout=20)
    leaving.cancel()
    await asyncio.wait([leaving])
    staying = asyncio.create_task(rate(feedback, "b", 0.0))
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
