"""What the router remembers: calibrations, conversations, shares, and what callers say of their answers."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace import errors
from headrace.client import Client, chat
from headrace.router.__main__ import router
from headrace.router.settings import Settings
from headrace.router.state.feedback import Answered, Feedback
from headrace.routing import calibration, scorer
from headrace.routing.calibration import Calibration
from headrace.routing.score import fingerprint
from headrace.runtime.server import StartFailed
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import routing_service_pb2 as routing
from tests.harness import PATIENCE, collect
from tests.router.fake_batchers import Front, routed

EASY = "Hello!"
HARD = "Prove step by step that every natural number has one prime factorisation, and explain why."


def calibrated(threshold: float, *, tiers: tuple[str, ...] = ("small", "large"), of: str = "") -> Calibration:
    return Calibration(
        tiers=tiers,
        thresholds=(0.0, threshold),
        shares=(0.5, 0.5),
        scorer=of or fingerprint(scorer.load()),
        rows=10,
        quantiles=(),
    )


async def threshold_of(client: Client) -> float:
    return (await client.explain(chat(EASY))).candidates[-1].threshold


async def until_threshold(client: Client, wanted: object) -> None:
    async with asyncio.timeout(PATIENCE):
        while await threshold_of(client) != (pytest.approx(wanted) if isinstance(wanted, float) else wanted):
            await asyncio.sleep(0.01)


async def test_a_calibration_is_read_again_when_it_changes_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "calibration.json"
    calibration.save(calibrated(0.25), path)
    settings = {"calibration": path, "poll_seconds": 0.02}
    async with routed(settings, small=Front(), large=Front()) as client:
        assert await threshold_of(client) == pytest.approx(0.25)

        calibration.save(calibrated(0.75), path)
        await until_threshold(client, 0.75)

        path.write_text("{")
        async with asyncio.timeout(PATIENCE):
            while "keeping the old one" not in caplog.text:
                await asyncio.sleep(0.01)
        assert await threshold_of(client) == pytest.approx(0.75)

        calibration.save(calibrated(0.1, of="another"), path)
        async with asyncio.timeout(PATIENCE):
            while caplog.text.count("keeping the old one") < 2:
                await asyncio.sleep(0.01)
        assert await threshold_of(client) == pytest.approx(0.75)

        calibration.save(calibrated(0.5), path)
        await until_threshold(client, 0.5)


async def test_with_a_share_a_calibration_that_changes_takes_effect_and_the_log_says_which(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The scores that it was made from replace those that the thresholds were quantiles of."""
    caplog.set_level("INFO")
    path = tmp_path / "calibration.json"
    low = replace(calibrated(0.5), quantiles=tuple(place / 1000 for place in range(101)))
    high = replace(calibrated(0.5), quantiles=tuple(0.9 + place / 1000 for place in range(101)))
    calibration.save(low, path)
    settings = {"calibration": path, "poll_seconds": 0.02, "share": "0.3"}
    async with routed(settings, small=Front(), large=Front()) as client:
        assert await threshold_of(client) == pytest.approx(0.07, abs=0.002)

        calibration.save(high, path)
        await until_threshold(client, pytest.approx(0.97, abs=0.002))
        (record,) = [record for record in caplog.records if record.message == "calibration read"]
        assert vars(record)["thresholds"] == [0.0, pytest.approx(0.97, abs=0.002)]

        calibration.save(calibrated(0.1), path)
        async with asyncio.timeout(PATIENCE):
            while "keeping the old one" not in caplog.text:
                await asyncio.sleep(0.01)
        assert await threshold_of(client) == pytest.approx(0.97, abs=0.002), "it has no scores"

    assert [record.message for record in caplog.records].count("calibration read") == 1


@pytest.mark.parametrize("beside", [{"share": "0.3"}, {"calibration": True}])
async def test_thresholds_that_are_not_used_are_named_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, beside: dict[str, Any]
) -> None:
    path = tmp_path / "calibration.json"
    calibration.save(calibrated(0.5), path)
    given: dict[str, Any] = {
        "tiers": "small=127.0.0.1:1,large=127.0.0.1:2",
        "thresholds": "0.4",
        **{name: path if name == "calibration" else value for name, value in beside.items()},
    }
    async with router(Settings(port=0, **given)):
        pass

    assert "--thresholds is not used" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"quantiles": (float("nan"),)},
        {"quantiles": (2.0,)},
        {"quantiles": (-1.0,)},
        {"quantiles": (0.5,) * 20_000},
    ],
)
def test_scores_that_are_none_make_no_calibration(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = tmp_path / "calibration.json"
    calibration.save(replace(calibrated(0.5), **wrong), path)
    with pytest.raises(calibration.BadCalibration, match="quantiles"):
        calibration.load(path)


def test_a_calibration_is_no_pipe_that_a_router_would_wait_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(2**31)
    for path in (pipe, big, tmp_path):
        with pytest.raises(calibration.BadCalibration, match="not a file of at most"):
            calibration.load(path)


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (calibrated(0.5, tiers=("tiny", "huge")), "for the tiers tiny, huge, the router has small, large"),
        (calibrated(0.5, of="another"), "another scorer"),
        (None, "cannot be read"),
    ],
)
async def test_a_router_does_not_start_with_a_calibration_that_it_cannot_use(
    tmp_path: Path, made: Calibration | None, complaint: str
) -> None:
    path = tmp_path / "calibration.json"
    if made is not None:
        calibration.save(made, path)
    settings = Settings(port=0, tiers="small=127.0.0.1:1,large=127.0.0.1:2", calibration=path)
    with pytest.raises(StartFailed, match=complaint):
        async with router(settings):
            pass


async def test_a_router_does_not_start_with_a_scorer_that_it_cannot_use(tmp_path: Path) -> None:
    settings = Settings(port=0, tiers="small=127.0.0.1:1", scorer=tmp_path / "none.json")
    with pytest.raises(StartFailed, match="none"):
        async with router(settings):
            pass


async def test_a_share_is_held_on_traffic_that_all_scores_alike() -> None:
    small, large = Front(), Front()
    async with routed({"share": "0.3"}, small=small, large=large) as client:
        for _ in range(60):
            await collect(client, chat(EASY))
        pinned = chat(EASY)
        pinned.routing.tier = "small"
        await collect(client, pinned)

    assert abs(len(large.requests) - 18) <= 9
    assert len(small.requests) + len(large.requests) == 61


async def test_a_conversation_moves_only_up() -> None:
    def said(text: str, session: str, tenant: str = "") -> pb.GenerateRequest:
        request = chat(text)
        request.routing.session_id = session
        request.routing.tenant = tenant
        return request

    async with routed({"thresholds": "0.4"}, small=Front(), large=Front()) as client:
        tiers = [
            (await collect(client, request)).accepted.tier
            for request in (said(EASY, "a"), said(HARD, "a"), said(EASY, "a"), said(EASY, "b"))
        ]
        explained = await client.explain(said(EASY, "a"))
        other = await client.explain(said(EASY, "a", tenant="other"))

    assert [tier or "?" for tier in tiers] == ["small", "large", "large", "small"]
    assert "conversation has reached 'large'" in explained.why
    assert other.tier == "small"


async def test_an_idle_conversation_begins_anew() -> None:
    request = chat(HARD)
    request.routing.session_id = "a"
    again = chat(EASY)
    again.routing.session_id = "a"
    settings = {"thresholds": "0.4", "session_idle_seconds": 0}
    async with routed(settings, small=Front(), large=Front()) as client:
        await collect(client, request)
        assert (await client.explain(again)).tier == "small"


async def test_feedback_joins_prompt_and_outcome_on_disk(tmp_path: Path, count: Callable[..., float]) -> None:
    before = count("headrace.feedback", tier="small", outcome="good")
    path = tmp_path / "feedback.jsonl"
    settings = {"feedback": path, "thresholds": "0.4"}
    async with routed(settings, small=Front(), large=Front()) as client:
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
    assert path.stat().st_mode & 0o077 == 0, "prompts are for the owner of the file alone"
    assert count("headrace.feedback", tier="small", outcome="good") == before + 1


async def test_without_a_file_no_prompt_is_kept_anywhere() -> None:
    async with routed(small=Front(), large=Front()) as client:
        answer = await collect(client, chat(EASY))
        said = await client.feedback(answer.accepted.request_id, ok=False)

    assert not said.kept
    feedback = Feedback()
    feedback.remember("a", Answered("small", 0.5, "a secret"))
    assert feedback.recall("a").prompt == ""


async def test_the_file_of_feedback_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    feedback = Feedback(path, max_bytes=1000, remembered=3)
    for place in range(50):
        feedback.remember(str(place), Answered("small", 0.5, f"prompt {place}"))
        await feedback.keep(str(place), "small", 1.0)

    assert sorted(os.listdir(tmp_path)) == ["feedback.jsonl", "feedback.jsonl.1"]
    assert all(os.stat(tmp_path / name).st_size <= 1000 for name in os.listdir(tmp_path))
    assert json.loads(path.read_text().splitlines()[-1])["prompt"] == "prompt 49"
    with pytest.raises(errors.UnknownRequest):
        feedback.recall("46")


async def test_prompts_that_are_remembered_are_bounded_together(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "feedback.jsonl", max_bytes=1000)
    for place in range(5):
        feedback.remember(str(place), Answered("small", 0.5, "x" * 400))
    feedback.remember("4", Answered("small", 0.5, "x" * 400))
    feedback.remember("huge", Answered("small", 0.5, "x" * 2000))

    assert feedback.recall("3").prompt == "x" * 400
    assert await feedback.keep("3", "small", 1.0)
    assert not await feedback.keep("huge", "small", 1.0), "no file holds it"
    with pytest.raises(errors.UnknownRequest):
        feedback.recall("2")


async def test_a_disk_that_is_full_leaves_no_half_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "feedback.jsonl"
    async with routed({"feedback": path}, small=Front(), large=Front()) as client:
        first, id = [(await collect(client, chat(EASY))).accepted.request_id for _ in range(2)]
        await client.feedback(first, ok=True)
        whole = path.read_bytes()
        with monkeypatch.context() as patched:
            write = os.write
            patched.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
            with pytest.raises(errors.InternalError, match="file of feedback"):
                await client.feedback(id, ok=True)
        assert path.read_bytes() == whole
        await client.feedback(id, ok=True)

    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2


async def test_rows_are_written_one_by_one_though_a_caller_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feedback = Feedback(tmp_path / "feedback.jsonl")
    feedback.remember("a", Answered("small", 0.5, "prompt"))
    feedback.remember("b", Answered("small", 0.5, "prompt"))
    began, go, write = threading.Semaphore(0), threading.Event(), os.write

    def slow(handle: int, data: bytes) -> int:
        began.release()
        go.wait(20)
        return write(handle, data)

    monkeypatch.setattr(os, "write", slow)
    leaving = asyncio.create_task(feedback.keep("a", "small", 1.0))
    assert await asyncio.to_thread(began.acquire, timeout=20)
    leaving.cancel()
    await asyncio.wait([leaving])
    staying = asyncio.create_task(feedback.keep("b", "small", 0.0))
    together = await asyncio.to_thread(began.acquire, timeout=0.2)
    go.set()

    assert await staying
    assert not together


async def test_grpc_callers_must_give_an_outcome() -> None:
    async with routed(small=Front(), large=Front()) as client:
        with pytest.raises(errors.InvalidRequest, match="no outcome"):
            await client._unary(client._routing.Feedback(routing.FeedbackRequest(request_id="a"), timeout=5))


async def test_prices_and_bills_are_listed() -> None:
    settings = {"prices": "small=1/2,large=10/20"}
    async with routed(settings, small=Front(), large=Front()) as client:
        for _ in range(3):
            await collect(client, chat(EASY))
        listed = await client.list_tiers()

    assert (listed.tiers[1].price.prompt, listed.tiers[1].price.completion) == (10, 20)
    (charge,) = listed.bill.charges
    assert (charge.tier, charge.answers, charge.completion_tokens) == ("small", 3, 3 * len(EASY))
    assert listed.bill.cost == pytest.approx(3 * len(EASY) * 2 / 1e6)
    assert listed.bill.largest_tier_cost == pytest.approx(3 * len(EASY) * 20 / 1e6)


async def test_a_feedback_file_that_cannot_be_written_ends_the_start(tmp_path: Path) -> None:
    """Not the first outcome that somebody tells."""
    nowhere = tmp_path / "nowhere" / "feedback.jsonl"

    with pytest.raises(StartFailed, match=f"{nowhere} cannot be written: No such file"):
        async with router(Settings(port=0, tiers="small=127.0.0.1:1", feedback=nowhere)):
            pass
