"""Scorer files are read again when they change, together with their calibration or not at all."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.client import Client, chat
from headrace.router.__main__ import router
from headrace.router.changes.scorer_files import ScorerFiles
from headrace.router.changes.scorers import Scorers
from headrace.router.settings import Settings
from headrace.router.state.thresholds import Thresholds
from headrace.routing.calibration import Calibration
from headrace.routing.policy import decide
from headrace.routing.request import Hints
from headrace.routing.tier_view import TierView
from headrace.runtime.serving.server import StartFailed
from tests.harness import PATIENCE, collect
from tests.router.changes.candidates import ALL_LARGE, ALL_SMALL, write, write_calibration
from tests.router.drafts import EASY
from tests.router.fake_batchers import FakeBatcher, routed

QUICKLY: dict[str, Any] = {"poll_seconds": 0.02}


async def pair_of(client: Client) -> tuple[float, float]:
    """The score of an easy prompt, and the threshold of the large tier."""
    explained = await client.explain(chat(EASY))
    return round(explained.score, 3), round(explained.candidates[-1].threshold, 3)


async def until(client: Client, wanted: tuple[float, float]) -> None:
    async with asyncio.timeout(PATIENCE):
        while await pair_of(client) != wanted:
            await asyncio.sleep(0.01)


async def until_logged(caplog: pytest.LogCaptureFixture, phrase: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while phrase not in caplog.text:
            await asyncio.sleep(0.01)


async def test_a_scorer_is_read_again_when_it_changes_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "scorer.json", ALL_SMALL)
    async with routed({"scorer": path, **QUICKLY}, small=FakeBatcher(), large=FakeBatcher()) as client:
        before = await collect(client, chat(EASY))
        write(path, ALL_LARGE)
        await until(client, (1.0, 0.5))
        after = await collect(client, chat(EASY))
        path.write_text('{"format": 1, "kind": "scorer"')
        await until_logged(caplog, "scorer not usable, keeping the old one")
        kept = await collect(client, chat(EASY))
        write(path, ALL_SMALL)
        await until(client, (0.0, 0.5))

    tiers = [answer.accepted.tier for answer in (before, after, kept)]
    assert tiers == ["small", "large", "large"]


@pytest.mark.parametrize("first", ["scorer", "calibration"])
async def test_scorer_and_calibration_change_together_in_whatever_order_their_files_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: str
) -> None:
    """In between, one of the files is for the other's predecessor: the old pair stays in use."""
    path, made = tmp_path / "scorer.json", tmp_path / "calibration.json"
    write(path, ALL_SMALL)
    write_calibration(made, ALL_SMALL, 0.25)
    files = {"scorer": path, "calibration": made}
    async with routed({**files, **QUICKLY}, small=FakeBatcher(), large=FakeBatcher()) as client:
        assert await pair_of(client) == (0.0, 0.25)
        changes = [lambda: write(path, ALL_LARGE), lambda: write_calibration(made, ALL_LARGE, 0.75)]
        if first == "calibration":
            changes.reverse()
        changes[0]()
        await until_logged(caplog, "scorer and calibration are no pair, keeping the old ones")
        assert await pair_of(client) == (0.0, 0.25)

        changes[1]()
        await until(client, (1.0, 0.75))


async def test_a_bad_scorer_does_not_prevent_a_new_calibration_of_the_one_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, made = tmp_path / "scorer.json", tmp_path / "calibration.json"
    write(path, ALL_SMALL)
    write_calibration(made, ALL_SMALL, 0.25)
    files = {"scorer": path, "calibration": made}
    async with routed({**files, **QUICKLY}, small=FakeBatcher(), large=FakeBatcher()) as client:
        path.write_text("{")
        await until_logged(caplog, "scorer not usable")
        write_calibration(made, ALL_SMALL, 0.75)
        await until(client, (0.0, 0.75))


async def test_a_share_is_kept_while_the_scorer_changes(tmp_path: Path) -> None:
    """The scores of the new one have another scale. No calibration says which."""
    drawn, words = random.Random(3), ["prove", "the", "sum", "of", "code", "a", "is", "what"]
    prompts = [" ".join(drawn.choices(words, k=12)) for _ in range(60)]
    path = write(tmp_path / "scorer.json", 0.0)
    small, large = FakeBatcher(), FakeBatcher()
    async with routed({"scorer": path, "share": "0.3", **QUICKLY}, small=small, large=large) as client:
        for prompt in prompts * 2:
            await collect(client, chat(prompt))
        old = (await client.explain(chat(EASY))).score
        write(path, 0.3)
        async with asyncio.timeout(PATIENCE):
            while (await client.explain(chat(EASY))).score == old:
                await asyncio.sleep(0.01)
        large_before = len(large.requests)
        for prompt in prompts * 2:
            await collect(client, chat(prompt))

    assert abs(large_before - 36) <= 9
    assert abs(len(large.requests) - large_before - 36) <= 9


@given(
    scores=st.lists(st.floats(0, 1), min_size=50, max_size=150),
    changes=st.sets(st.integers(0, 149), max_size=5),
    shares=st.sampled_from([(0.1,), (0.3,), (0.7,), (0.2, 0.3)]),
    quantiles=st.lists(st.floats(0, 1), max_size=20),
)
def test_changes_of_the_scorer_never_cost_a_share_more_than_any_traffic_does(
    scores: list[float], changes: set[int], shares: tuple[float, ...], quantiles: list[float]
) -> None:
    """Each arm keeps the share by itself; `ShareKeeper` states the bound."""
    names = ("small", "medium", "large")[: len(shares) + 1]
    thresholds = Thresholds([place / len(names) for place in range(len(names))], shares=shares)
    thresholds.use(None, "canary")
    calls: dict[str, list[int]] = {"": [], "canary": []}
    for place, score in enumerate(scores):
        arm = "canary" if place % 3 == 0 else ""
        if place in changes:
            made = Calibration(names, (0.0,), (), "", 0, tuple(quantiles))
            thresholds.use(made if place % 2 else None, arm)
        tiers = [TierView(*each) for each in zip(names, thresholds.now(arm), strict=True)]
        chosen = decide(score, Hints(), tiers).wanted
        thresholds.record(score, chosen, arm)
        calls[arm].append(chosen)

    for own in calls.values():
        for tier in range(1, len(names)):
            wanted = sum(shares[tier - 1 :]) * len(own)
            assert abs(sum(place >= tier for place in own) - wanted) <= 8 + 2


def test_a_share_is_kept_even_if_the_scorer_changes_before_every_call() -> None:
    """What was called too much or too little is carried over; the window of scores is empty each time."""
    thresholds = Thresholds([0.0, 0.5], shares=[0.3])
    large = 0
    for place in range(200):
        thresholds.use(None)
        score = (place * 0.618) % 1
        chosen = int(score >= thresholds.now()[1])
        thresholds.record(score, chosen)
        large += chosen

    assert abs(large - 60) <= 10


@pytest.mark.parametrize("flag", ["scorer", "canary"])
async def test_a_pipe_and_an_endless_file_are_rejected_as_scorers(tmp_path: Path, flag: str) -> None:
    pipe, big = tmp_path / "pipe", tmp_path / "big"
    os.mkfifo(pipe)
    with big.open("wb") as file:
        file.truncate(2**31)
    for path in (pipe, big, tmp_path):
        given: dict[str, Any] = {flag: f"{path}:0.1" if flag == "canary" else path}
        with pytest.raises(StartFailed, match="not a file of at most 16 MiB"):
            async with router(Settings(port=0, tiers="small=127.0.0.1:1", **given)):
                pass


def test_a_file_that_is_replaced_by_one_with_the_same_content_is_no_change(tmp_path: Path) -> None:
    """A candidate that was rolled back stays so."""
    path, copy = write(tmp_path / "scorer.json", ALL_SMALL), tmp_path / "copy"
    files = ScorerFiles(path, None, tiers=("small", "large"))
    before = files.loaded
    copy.write_bytes(path.read_bytes())
    copy.replace(path)

    assert files.changed
    assert files.read() == "same"
    assert files.loaded is before
    path.write_text("{")
    assert files.read() == "rejected"
    assert files.loaded is before
    write(path, ALL_LARGE)
    assert files.read() == "used"
    assert files.loaded.identity != before.identity


async def test_only_files_that_are_used_or_bad_are_counted(
    tmp_path: Path, count: Callable[..., float]
) -> None:
    path = write(tmp_path / "scorer.json", ALL_SMALL)
    thresholds = Thresholds([0.0, 0.5])
    scorers = Scorers(ScorerFiles(path, None, tiers=("small", "large")), thresholds)
    before = {verdict: count("headrace.scorer.reads", verdict=verdict) for verdict in ("used", "rejected")}
    for text in (path.read_text(), "[" * 100_000):
        path.write_text(text)
        os.utime(path, ns=(1, 1))  # another time than before
        await scorers.refresh()

    assert count("headrace.scorer.reads", verdict="used") == before["used"]
    assert count("headrace.scorer.reads", verdict="rejected") == before["rejected"] + 1
