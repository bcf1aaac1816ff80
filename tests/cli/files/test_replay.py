"""`headrace replay` estimates from a router's own log, and says what is wrong with files and options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from headrace.cli.__main__ import app
from headrace.client import chat
from headrace.routing import calibration
from headrace.routing.calibration import Calibration
from headrace.routing.scoring import scorer
from headrace.routing.scoring.score import Objective, fingerprint
from headrace.routing.success.heads import Heads
from tests.harness import collect
from tests.router.fake_batchers import FakeBatcher, routed

PROMPT = "How many primes are below {}?"
REQUESTS = 120  # half of them go to either tier: fewer than 20 to one has a probability of 1e-14


async def write_log(path: Path, **settings: Any) -> None:
    """Write the log of a router that explores, on whose large tier alone answers are good."""
    given = {"decision_log": path, "thresholds": "0.9", "prices": "small=1/1,large=9/9", **settings}
    async with routed(given, small=FakeBatcher(pieces=50), large=FakeBatcher(pieces=50)) as client:
        for number in range(REQUESTS):
            answer = await collect(client, chat(PROMPT.format(number)))
            good = answer.accepted.tier == "large"
            await client.feedback(answer_id=answer.accepted.answer_id, ok=good)


def replay(*arguments: object, columns: int = 200) -> tuple[int, str]:
    environment = {"COLUMNS": f"{columns}", "NO_COLOR": "1"}
    ran = CliRunner().invoke(app, ["replay", *map(str, arguments)], env=environment)
    return ran.exit_code, ran.output


async def test_a_log_with_exploration_shows_what_more_calls_to_the_large_tier_bring(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    await write_log(path, explore=1.0)
    status, printed = replay(path, "--share", 1, "--json")
    result = json.loads(printed)

    assert status == 0
    assert result["requests"] == REQUESTS
    assert result["tiers"]["large"]["candidate"] == 1.0
    quality, cost = result["measures"]["quality"], result["measures"]["cost"]
    assert quality["problem"] == cost["problem"] == ""
    assert quality["dr"]["value"] == pytest.approx(1, abs=0.05)
    assert quality["difference"]["low"] > 0.2
    assert quality["verdict"].startswith("the candidate is better")
    assert cost["verdict"].startswith("the candidate is worse")
    status, printed = replay(path, "--share", 1)
    assert status == 0
    assert "quality: the candidate is better, by +" in printed
    assert "errors: no difference is seen" in printed
    assert "IPS" in printed
    for columns in (80, 50):
        printed = replay(path, "--share", 1, columns=columns)[1]
        assert "…" not in printed, "no figure is cut off"


async def test_a_log_without_exploration_cannot_tell(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    await write_log(path)
    status, printed = replay(path, "--thresholds", "0")

    assert status == 0
    assert "quality: the log cannot tell" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith(" quality ")]
    assert line.rstrip().endswith("cannot tell"), "and no figure that it does not support"
    assert "Run the router with --explore" in printed
    assert "IPS" not in printed

    lines = path.read_text().splitlines()
    judged = [line.replace('"caller"', '"judge"') for line in lines if '"rating"' in line]
    path.write_text("\n".join([*lines, *judged]) + "\n")
    (line,) = [
        line for line in replay(path, "--thresholds", "0")[1].splitlines() if line.startswith("judged:")
    ]
    assert "--shadow-scorer" in line
    assert "--explore" not in line, "chance shows no verdict of a judge"


async def test_a_candidate_scorer_is_read_and_the_rotated_file_too(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    await write_log(path, explore=1.0, decision_log_text=True)
    lines = path.read_text().splitlines(keepends=True)
    path.with_name("decisions.jsonl.1").write_text("".join(lines[:100]))
    path.write_text("".join(lines[100:]))
    candidate, model = tmp_path / "scorer.json", scorer.load().model
    scorer.save(replace(model, heads=-model.heads), candidate)
    status, printed = replay(path, "--candidate", candidate, "--json")

    assert status == 0
    assert json.loads(printed)["requests"] == REQUESTS
    assert json.loads(printed)["measures"]["quality"]["differ"] > 0
    assert json.loads(replay(path, "--share", 0.5, "--last", 30, "--json")[1])["requests"] == 30


async def test_a_candidate_whose_chances_cannot_be_used_is_explained(tmp_path: Path) -> None:
    path, candidate = tmp_path / "decisions.jsonl", tmp_path / "scorer.json"
    await write_log(path, explore=1.0)
    model = scorer.load().model
    inputs, kinds = model.gate.shape[1] + len(model.kinds), len(model.kinds)
    heads = Heads(("small", "large"), np.zeros((2, inputs)), np.zeros(2), np.ones((2, kinds)), (50, 50))
    scorer.save(replace(model, tiers=heads), candidate)

    printed = replay(path, "--candidate", candidate)[1]
    assert f"{REQUESTS} are chosen by the candidate's score although" in printed
    assert "although" not in replay(path, "--candidate", candidate, "--share", 0.3)[1]


async def test_the_shipped_scorer_is_evaluated_with_another_objective(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    await write_log(path, explore=1.0)
    aims: tuple[Objective, ...] = ("correctness", "preference")
    scores = [scorer.load(None, aim).score(PROMPT.format(1)).value for aim in aims]
    found = [
        json.loads(replay(path, "--objective", aim, "--thresholds", sum(scores) / 2, "--json")[1])
        for aim in aims
    ]

    shares = [one["tiers"]["large"]["candidate"] for one in found]
    assert (shares[0] > shares[1]) == (scores[0] > scores[1])
    assert abs(shares[0] - shares[1]) > 0.5
    assert replay(path, "--objective", "speed")[0] == 2


async def test_a_log_without_ratings_says_so(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    await write_log(path, explore=1.0)
    rows = [line for line in path.read_text().splitlines(keepends=True) if '"rating"' not in line]
    path.write_text("".join(rows))
    status, printed = replay(path, "--share", 0.5)

    assert status == 0
    assert "quality: the log cannot tell: no answer has a rating" in printed


async def test_wrong_options_and_files_are_explained(tmp_path: Path) -> None:
    path, other = tmp_path / "decisions.jsonl", tmp_path / "other.jsonl"
    await write_log(path, explore=1.0)
    other.write_text('{"prompt": "Hi", "small_ok": 1}\n')
    calibrated = tmp_path / "calibration.json"
    calibration.save(Calibration(("small", "large"), (0.0, 0.5), (0.5, 0.5), "another", 1, ()), calibrated)
    for arguments, complaint in (
        ((path,), "give one of --candidate"),
        ((path, "--share", 0.5, "--thresholds", 0.5), "give one of"),
        ((path, "--share", "0.5,0.1"), "--share needs 1 numbers"),
        ((path, "--share", "half"), "not a list of numbers"),
        ((path, "--thresholds", "2"), "ascending --thresholds"),
        ((path, "--calibration", calibrated), "made with another scorer or --objective than the log"),
        ((path, "--candidate", other), "not a scorer"),
        ((other, "--share", 0.5), "row 1: not a row of a decision log"),
        ((tmp_path / "none.jsonl", "--share", 0.5), "cannot be read"),
    ):
        status, printed = replay(*arguments)
        assert status == 2, printed
        assert complaint in " ".join(printed.split())
    calibration.save(
        Calibration(("small", "large"), (0.0, 0.5), (0.5, 0.5), fingerprint(scorer.load()), 1, ()), calibrated
    )
    assert replay(path, "--calibration", calibrated)[0] == 0
