"""An optional step never fails a request, whatever it raises, and the log does not quote the request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.client import chat
from headrace.router.answering import cascade
from headrace.router.changes.scorers import Scorers
from headrace.router.chooser import Chooser
from headrace.router.optional import optional
from headrace.router.state.bills import Bill
from headrace.router.state.conversations import Conversations
from headrace.router.state.feedback import Feedback
from headrace.router.state.tier_pace import TierPace
from headrace.routing import calibration
from headrace.routing.drafts import arithmetic
from headrace.routing.drafts import features as draft_features
from headrace.routing.drafts.check import DraftChecker
from headrace.routing.scoring.scorer import LearnedScorer
from headrace.routing.share import ShareKeeper
from headrace.v1 import generation_pb2 as pb
from tests.harness import PATIENCE, Answer, collect
from tests.router.drafts import BAD, CASCADE, GOOD, QUESTION, SAMPLED, SUM, TextBatcher
from tests.router.fake_batchers import FakeBatcher, routed
from tests.router.state.test_thresholds import calibrated, threshold_of, until_threshold

SECRET = "Calculate --3 + 5, and keep it secret"


async def answered_without(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str, share: str = ""
) -> Answer:
    """Return the answer to a prompt of a session, checked with a sample, while *name* of *where* raises."""

    def broken(*_: object, **__: object) -> None:
        raise ValueError(f"could not convert string to float: {SECRET!r}")

    request = chat(SECRET)
    request.routing.session_id = "s"
    settings = {**SAMPLED, "share": share}
    if share:
        settings["thresholds"] = ""
    async with routed(settings, small=TextBatcher(sample=GOOD), large=TextBatcher()) as client:
        monkeypatch.setattr(where, name, broken)
        for _ in range(2):
            answer = await collect(client, request)
    return answer


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (LearnedScorer, "score"),
        (DraftChecker, "check"),
        (draft_features, "agreement"),
        (arithmetic, "equations"),
        (Chooser, "holds_back"),
        (Chooser, "draws_sample"),
        (Chooser, "record_decision"),
        (Conversations, "reached"),
        (Conversations, "record"),
        (TierPace, "record"),
        (Bill, "add_attempt"),
        (Bill, "add_answer"),
        (Bill, "add_sample"),
        (Bill, "add"),
        (Feedback, "remember"),
        (ShareKeeper, "record"),
        (ShareKeeper, "thresholds"),
    ],
)
async def test_an_optional_step_that_fails_fails_no_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: object, name: str
) -> None:
    answer = await answered_without(monkeypatch, where, name, share="0.3" if where is ShareKeeper else "")

    assert answer.text == GOOD
    assert answer.finish.reason == pb.FINISH_REASON_STOP
    assert "secret" not in caplog.text


async def test_a_draft_is_checked_without_a_sample_that_cannot_be_requested(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await answered_without(monkeypatch, cascade, "sample_request")

    assert answer.text == GOOD
    assert "optional step failed" in caplog.text


async def test_a_draft_that_cannot_be_checked_is_released(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, count: Callable[..., float]
) -> None:
    before = count("headrace.drafts", verdict="unchecked")
    answer = await answered_without(monkeypatch, DraftChecker, "check")

    assert answer.accepted.tier == "small"
    assert count("headrace.drafts", verdict="unchecked") == before + 2
    record = next(record for record in caplog.records if record.message.startswith("optional step failed"))
    assert (vars(record)["step"], vars(record)["error"]) == ("draft check", "ValueError")


async def test_a_prompt_that_cannot_be_scored_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = await answered_without(monkeypatch, LearnedScorer, "score")

    assert not answer.accepted.HasField("score")


async def test_requests_without_a_score_do_not_move_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no score")

    settings = {**CASCADE, "share": "0.3", "thresholds": ""}
    small = TextBatcher(text=GOOD)
    async with routed(settings, small=small, large=TextBatcher()) as client:
        for text in ("Hello!", QUESTION, SUM, "Prove that the square root of 2 is irrational."):
            await collect(client, chat(text))
        before = await threshold_of(client)
        small.text = BAD
        with monkeypatch.context() as patched:
            patched.setattr(LearnedScorer, "score", broken)
            answers = [await collect(client, chat(QUESTION)) for _ in range(8)]

        assert {answer.accepted.tier for answer in answers} == {"large"}, "their drafts were discarded"
        assert await threshold_of(client) == before


@pytest.mark.parametrize("prompt", ["Calculate --3 + 5", "What is -$-5 plus 2?", "How many are - 5?"])
@pytest.mark.parametrize(
    "draft", ["= -\u00a05", "3 + 5 = -\u00a08. The answer is --8.", "-$-5", "4 = −\u20095"]
)
async def test_ambiguous_signs_fail_no_request(prompt: str, draft: str) -> None:
    async with routed(
        SAMPLED, small=TextBatcher(text=draft, sample=draft), large=TextBatcher(text=draft)
    ) as client:
        answer = await collect(client, chat(prompt))

    assert answer.text == draft


async def test_a_calibration_that_cannot_be_read_does_not_stop_the_router(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "calibration.json"
    calibration.save(calibrated(0.25), path)
    refresh = Scorers.refresh
    failures = iter([RuntimeError("a"), MemoryError("b")])

    async def sometimes(self: Scorers, arm: str) -> None:
        if (failure := next(failures, None)) is not None:
            raise failure
        await refresh(self, arm)

    monkeypatch.setattr(Scorers, "refresh", sometimes)
    async with routed(
        {"calibration": path, "poll_seconds": 0.02}, small=FakeBatcher(), large=FakeBatcher()
    ) as client:
        calibration.save(calibrated(0.75), path)
        await until_threshold(client, 0.75)
        answer = await collect(client, chat("Hi!"))

    assert answer.finish.reason == pb.FINISH_REASON_STOP


async def test_cancellation_is_not_caught_as_a_failed_step() -> None:
    async def helped() -> None:
        with optional("helper"):
            await asyncio.sleep(PATIENCE)

    task = asyncio.create_task(helped())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()
