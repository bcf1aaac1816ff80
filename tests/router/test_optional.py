"""What helps a request never fails it, whatever it raises, and the log does not quote the request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.client import chat
from headrace.router import service
from headrace.router.chooser import Chooser
from headrace.router.optional import optional
from headrace.router.state.bills import Bill
from headrace.router.state.conversations import Sessions
from headrace.router.state.feedback import Feedback
from headrace.router.state.thresholds import Thresholds
from headrace.router.state.tier_pace import Pace
from headrace.routing import calibration
from headrace.routing.drafts import arithmetic
from headrace.routing.drafts import features as draft_features
from headrace.routing.drafts.check import DraftChecker
from headrace.routing.scorer import LearnedScorer
from headrace.routing.share import ShareKeeper
from headrace.v1 import generation_pb2 as pb
from tests.harness import PATIENCE, Answer, collect
from tests.router.answering.test_cascade import BAD, CASCADE, GOOD, QUESTION, SAMPLED, SUM, Speaker
from tests.router.fake_batchers import Front, routed
from tests.router.state.test_thresholds import calibrated, threshold_of, until_threshold

SECRET = "Calculate --3 + 5, and keep it secret"


async def answered_without(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str, share: str = ""
) -> Answer:
    """The answer to a prompt of a session, judged with a sample, while *name* of *where* raises."""

    def broken(*_: object, **__: object) -> None:
        raise ValueError(f"could not convert string to float: {SECRET!r}")

    request = chat(SECRET)
    request.routing.session_id = "s"
    settings = {**SAMPLED, "share": share}
    if share:
        settings["thresholds"] = ""
    async with routed(settings, small=Speaker(sample=GOOD), large=Speaker()) as client:
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
        (Chooser, "judges"),
        (Chooser, "samples"),
        (Chooser, "note"),
        (Sessions, "reached"),
        (Sessions, "note"),
        (Pace, "note"),
        (Bill, "asked"),
        (Bill, "answered"),
        (Bill, "sampled"),
        (Bill, "add"),
        (Feedback, "remember"),
        (ShareKeeper, "note"),
        (ShareKeeper, "thresholds"),
    ],
)
async def test_a_helper_that_fails_fails_no_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: object, name: str
) -> None:
    answer = await answered_without(monkeypatch, where, name, share="0.3" if where is ShareKeeper else "")

    assert answer.text == GOOD
    assert answer.finish.reason == pb.FINISH_REASON_STOP
    assert "secret" not in caplog.text


async def test_a_sample_that_cannot_be_asked_for_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await answered_without(monkeypatch, service, "sample_request")

    assert answer.text == GOOD
    assert "helper failed" in caplog.text


async def test_a_draft_that_cannot_be_judged_is_released_as_without_a_judge(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, count: Callable[..., float]
) -> None:
    before = count("headrace.drafts", outcome="unjudged")
    answer = await answered_without(monkeypatch, DraftChecker, "check")

    assert answer.accepted.tier == "small"
    assert count("headrace.drafts", outcome="unjudged") == before + 2
    record = next(record for record in caplog.records if record.message.startswith("helper failed"))
    assert (vars(record)["helper"], vars(record)["error"]) == ("draft check", "ValueError")


async def test_a_prompt_that_cannot_be_scored_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = await answered_without(monkeypatch, LearnedScorer, "score")

    assert not answer.accepted.HasField("score")


async def test_requests_without_a_score_do_not_move_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no score")

    settings = {**CASCADE, "share": "0.3", "thresholds": ""}
    small = Speaker(text=GOOD)
    async with routed(settings, small=small, large=Speaker()) as client:
        for text in ("Hello!", QUESTION, SUM, "Prove that the square root of 2 is irrational."):
            await collect(client, chat(text))
        before = await threshold_of(client)
        small.text = BAD
        with monkeypatch.context() as patched:
            patched.setattr(LearnedScorer, "score", broken)
            answers = [await collect(client, chat(QUESTION)) for _ in range(8)]

        assert {answer.accepted.tier for answer in answers} == {"large"}, "their drafts were given up"
        assert await threshold_of(client) == before


@pytest.mark.parametrize("prompt", ["Calculate --3 + 5", "What is -$-5 plus 2?", "How many are - 5?"])
@pytest.mark.parametrize(
    "draft", ["= -\u00a05", "3 + 5 = -\u00a08. The answer is --8.", "-$-5", "4 = −\u20095"]
)
async def test_signs_that_nobody_can_read_fail_no_request(prompt: str, draft: str) -> None:
    async with routed(SAMPLED, small=Speaker(text=draft, sample=draft), large=Speaker(text=draft)) as client:
        answer = await collect(client, chat(prompt))

    assert answer.text == draft


async def test_a_calibration_that_cannot_be_read_ends_no_router(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "calibration.json"
    calibration.save(calibrated(0.25), path)
    look = Thresholds.look
    failures = iter([RuntimeError("a"), MemoryError("b")])

    def sometimes(self: Thresholds) -> None:
        if (failure := next(failures, None)) is not None:
            raise failure
        look(self)

    monkeypatch.setattr(Thresholds, "look", sometimes)
    async with routed({"calibration": path, "poll_seconds": 0.02}, small=Front(), large=Front()) as client:
        calibration.save(calibrated(0.75), path)
        await until_threshold(client, 0.75)
        answer = await collect(client, chat("Hi!"))

    assert answer.finish.reason == pb.FINISH_REASON_STOP


async def test_a_request_that_is_cancelled_is_not_taken_for_a_helper_that_failed() -> None:
    async def helped() -> None:
        with optional("helper"):
            await asyncio.sleep(PATIENCE)

    task = asyncio.create_task(helped())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()
