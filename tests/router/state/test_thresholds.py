"""Thresholds: as configured, from a calibration, or adapted to a share of calls."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.client import Client, chat
from headrace.router.__main__ import router
from headrace.router.settings import Settings
from headrace.routing import calibration
from headrace.routing.calibration import Calibration
from headrace.routing.scoring import scorer
from headrace.routing.scoring.score import fingerprint
from headrace.runtime.serving.server import StartFailed
from tests.harness import PATIENCE, collect
from tests.router.drafts import EASY
from tests.router.fake_batchers import FakeBatcher, routed


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
    async with routed(settings, small=FakeBatcher(), large=FakeBatcher()) as client:
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


async def test_with_a_share_a_changed_calibration_takes_effect_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The scores of the calibration replace the recent scores."""
    caplog.set_level("INFO")
    path = tmp_path / "calibration.json"
    low = replace(calibrated(0.5), quantiles=tuple(place / 1000 for place in range(101)))
    high = replace(calibrated(0.5), quantiles=tuple(0.9 + place / 1000 for place in range(101)))
    calibration.save(low, path)
    settings = {"calibration": path, "poll_seconds": 0.02, "share": "0.3"}
    async with routed(settings, small=FakeBatcher(), large=FakeBatcher()) as client:
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
async def test_ignored_thresholds_are_logged_at_the_start(
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

    assert "--thresholds is ignored" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"quantiles": (float("nan"),)},
        {"quantiles": (2.0,)},
        {"quantiles": (-1.0,)},
        {"quantiles": (0.5,) * 20_000},
    ],
)
def test_a_calibration_with_invalid_scores_is_rejected(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = tmp_path / "calibration.json"
    calibration.save(replace(calibrated(0.5), **wrong), path)
    with pytest.raises(calibration.BadCalibration, match="quantiles"):
        calibration.load(path)


def test_a_pipe_is_rejected_as_a_calibration(tmp_path: Path) -> None:
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
async def test_a_router_does_not_start_with_an_unusable_calibration(
    tmp_path: Path, made: Calibration | None, complaint: str
) -> None:
    path = tmp_path / "calibration.json"
    if made is not None:
        calibration.save(made, path)
    settings = Settings(port=0, tiers="small=127.0.0.1:1,large=127.0.0.1:2", calibration=path)
    with pytest.raises(StartFailed, match=complaint):
        async with router(settings):
            pass


async def test_a_router_does_not_start_with_an_unusable_scorer(tmp_path: Path) -> None:
    settings = Settings(port=0, tiers="small=127.0.0.1:1", scorer=tmp_path / "none.json")
    with pytest.raises(StartFailed, match="none"):
        async with router(settings):
            pass


async def test_a_share_is_kept_on_traffic_with_equal_scores() -> None:
    small, large = FakeBatcher(), FakeBatcher()
    async with routed({"share": "0.3"}, small=small, large=large) as client:
        for _ in range(60):
            await collect(client, chat(EASY))
        pinned = chat(EASY)
        pinned.routing.tier = "small"
        await collect(client, pinned)

    assert abs(len(large.requests) - 18) <= 9
    assert len(small.requests) + len(large.requests) == 61
