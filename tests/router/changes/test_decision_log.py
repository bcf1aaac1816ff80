"""A router writes one row per ended request and one per rating, within bounds, and no text by default."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from headrace import errors
from headrace.client import Client, chat
from headrace.router import measuring
from headrace.router.__main__ import router
from headrace.router.changes.answered import Rating
from headrace.router.changes.decision_log import MAX_PENDING, DecisionLog
from headrace.router.settings import Settings
from headrace.routing.changes.records import Logged, join, parse
from headrace.routing.scoring.conversation import CHARACTERS, turns_of_row
from headrace.routing.scoring.score import fingerprint
from headrace.routing.scoring.scorer import load
from headrace.runtime.serving.server import StartFailed
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect, eventually
from tests.router.drafts import BAD, EASY, GOOD, HARD, PRICES, QUESTION, TextBatcher
from tests.router.fake_batchers import FakeBatcher, routed

SECRET = "the secret of the caller"
LONG = "Summarize this report. " + "The guests praised the kitchen, the garden and the weather. " * 1000


def rows(path: Path, kind: str = "") -> list[dict[str, Any]]:
    every = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in every if not kind or row["kind"] == kind]


async def ask(client: Client, text: str, **routing: Any) -> str:
    request = chat(text)
    for name, value in routing.items():
        setattr(request.routing, name, value)
    return (await collect(client, request)).accepted.request_id


async def test_each_request_has_a_row_with_choice_chances_and_result(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    settings = {"decision_log": path, "explore": 0.2, "thresholds": "0.4", **PRICES}
    async with routed(settings, small=FakeBatcher(), large=FakeBatcher()) as client:
        id = await ask(client, EASY, tenant="A")
        pinned = await ask(client, HARD, tier="small", session_id="s")

    first, second = (parse(row) for row in rows(path))
    assert isinstance(first, Logged)
    assert isinstance(second, Logged)
    assert (first.request, first.tenant, first.outcome, first.finish) == (id, "A", "ok", "stop")
    assert first.chances == pytest.approx({"small": 0.9, "large": 0.1})
    assert first.tier == first.choice
    assert first.tokens[2] == len(EASY), "the fake batcher counts characters"
    assert first.cost is not None
    assert first.cost > 0
    assert first.scorer == fingerprint(load())
    assert first.score == pytest.approx(load().score(EASY).value, abs=1e-6)
    assert [tier.threshold for tier in first.tiers] == [0.0, 0.4]
    assert (second.request, second.session, second.hints.tier) == (pinned, "s", "small")
    assert second.chances == {"small": 1.0}
    assert first.id != second.id


async def test_text_is_stored_only_by_setting(tmp_path: Path) -> None:
    path, with_text = tmp_path / "decisions.jsonl", tmp_path / "text.jsonl"
    for settings in ({"decision_log": path}, {"decision_log": with_text, "decision_log_text": True}):
        async with routed(settings, only=FakeBatcher(pieces=100_000)) as client:
            await ask(client, SECRET)
            request = pb.GenerateRequest()
            for role, text in (("user", "Hi"), ("assistant", "Hello"), ("user", SECRET)):
                request.chat.messages.add(role=role, content=text)
            await collect(client, request)
            await ask(client, LONG)

    assert SECRET not in path.read_text()
    one, several, long = rows(with_text)
    assert one["prompt"] == SECRET
    assert [message["content"] for message in several["messages"]] == ["Hi", "Hello", SECRET]
    assert len(long["prompt"]) <= 2 * CHARACTERS, "the part that was scored"
    assert load().score_turns(turns_of_row(long)).value == pytest.approx(long["score"], abs=1e-6)
    assert path.stat().st_mode & 0o077 == 0, "only the owner may read it"


async def test_ratings_are_rows_that_are_joined_with_their_request(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    async with routed({"decision_log": path}, small=FakeBatcher(), large=FakeBatcher()) as client:
        id = await ask(client, EASY, tenant="A")
        await ask(client, EASY, tenant="B")
        await client.feedback(id, quality=0.25, tenant="A")

    of_a, of_b = join(parse(row) for row in rows(path))
    assert list(of_a.qualities.values()) == [0.25]
    assert of_b.qualities == {}


async def test_a_shadow_answer_has_a_rating_of_its_own_tier(tmp_path: Path) -> None:
    """So that a replay knows both tiers' results for a sample of requests."""
    path = tmp_path / "decisions.jsonl"
    settings = {
        "decision_log": path,
        "thresholds": "1",
        "shadow_tier": "large",
        "shadow_share": 1.0,
        "judge": "rules",
    }
    small, large = TextBatcher(text=BAD), TextBatcher(text=GOOD)
    async with routed(settings, small=small, large=large) as client:
        await ask(client, QUESTION)
        await eventually(lambda: len(rows(path, "rating")) == 2)

    (one,) = join(parse(row) for row in rows(path))
    assert one.qualities == {("judge", "small"): 0.0, ("judge", "large"): 1.0}


async def test_requests_that_fail_have_a_row(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    async with routed({"decision_log": path}, only=FakeBatcher(refuses="broken")) as client:
        with pytest.raises(errors.NoWorkers):
            await ask(client, EASY)
        with pytest.raises(errors.UnknownTier):
            await ask(client, EASY, tier="huge")

    broken, unknown = (parse(row) for row in rows(path))
    assert isinstance(broken, Logged)
    assert isinstance(unknown, Logged)
    assert (broken.choice, broken.outcome, broken.finish) == ("only", "failed", "")
    assert (unknown.choice, unknown.outcome, unknown.tiers) == ("", "invalid", [])


async def test_a_request_whose_metrics_cannot_be_recorded_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no metrics")

    path = tmp_path / "decisions.jsonl"
    monkeypatch.setattr(measuring, "record", fail)
    async with routed({"decision_log": path}, only=FakeBatcher()) as client:
        await ask(client, EASY)

    (row,) = rows(path)
    assert row["outcome"] == "ok"


async def test_the_log_is_bounded_on_disk_and_counts_its_rows(
    tmp_path: Path, count: Callable[..., float]
) -> None:
    before = count("headrace.decision_log.rows")
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(path, max_bytes=1000)
    async with log.running():
        for place in range(100):
            log.rated(Rating("tenant", str(place), "small", 1.0))
    await asyncio.sleep(0)  # what the thread has asked the loop to count

    assert sorted(os.listdir(tmp_path)) == ["decisions.jsonl", "decisions.jsonl.1"]
    assert all(os.stat(tmp_path / name).st_size <= 1000 for name in os.listdir(tmp_path))
    assert rows(path)[-1]["request"] == "99"
    await eventually(lambda: count("headrace.decision_log.rows") == before + 100)


async def test_rows_that_the_disk_does_not_take_in_time_are_dropped_and_counted(
    tmp_path: Path, count: Callable[..., float]
) -> None:
    """The rows that wait are bounded, and nobody waits for them."""
    before = count("headrace.decision_log.dropped")
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(path, max_bytes=10_000_000)
    for place in range(MAX_PENDING + 50):  # nothing writes yet, as if the disk was stalled
        log.rated(Rating("", str(place), "small", 1.0))
    assert count("headrace.decision_log.dropped") == before + 50
    async with log.running():
        await eventually(
            lambda: path.read_bytes().count(b"\n") == MAX_PENDING
        )  # perhaps in the middle of a row
        log.rated(Rating("", "later", "small", 1.0))

    assert rows(path)[-1]["request"] == "later"


async def test_a_full_disk_fails_no_request_and_is_logged_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    count: Callable[..., float],
) -> None:

    def dropped(rows: float) -> bool:
        return count("headrace.decision_log.dropped") == rows

    before = count("headrace.decision_log.dropped")
    path, write = tmp_path / "decisions.jsonl", os.write
    with caplog.at_level(logging.INFO, "headrace.router.changes.decision_log"):
        async with routed({"decision_log": path}, small=FakeBatcher(), large=FakeBatcher()) as client:
            with monkeypatch.context() as patched:
                patched.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
                for number in (1, 2):
                    await ask(client, EASY)
                    await eventually(partial(dropped, before + number))
            id = await ask(client, EASY)

    assert [row["request"] for row in rows(path)] == [id], "no partial row is left"
    assert [record.message for record in caplog.records] == [
        "decision log not written, rows are lost",
        "decision log is written again",
    ]


async def test_a_router_does_not_start_with_an_unwritable_decision_log(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "decisions.jsonl"

    with pytest.raises(StartFailed, match=f"--decision-log {nowhere} cannot be written: No such file"):
        async with router(Settings(port=0, tiers="small=127.0.0.1:1", decision_log=nowhere)):
            pass


def test_settings_that_contradict_each_other_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="HEADRACE_DECISION_LOG_TEXT needs"):
        Settings(tiers="small=127.0.0.1:1", decision_log_text=True)
    with pytest.raises(ValueError, match="use the same file"):
        Settings(tiers="small=127.0.0.1:1", decision_log=tmp_path / "a", feedback=tmp_path / "a")
