"""`headrace train` learns each tier's chance of success from any outcomes, and says how good it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from headrace.cli.__main__ import app
from headrace.routing.scoring import scorer
from headrace.routing.success.estimate import Estimate

runner = CliRunner()

CODE = "Write a Python function that returns item {} of a list."
FACT = "Who built the bridge over the river in {}?"
SKILLS = {"code": {CODE: 0.9, FACT: 0.3}, "talk": {CODE: 0.2, FACT: 0.9}}


def rows(count: int, seed: int, *, reversed: bool = False, **fields: Any) -> list[dict[str, Any]]:
    """Return outcomes of prompts that one of two tiers answered, each good at one kind."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        text = (CODE, FACT)[rng.integers(2)]
        tier = ("code", "talk")[rng.integers(2)]
        good = bool(rng.random() < SKILLS[tier][text]) != reversed
        made.append({"prompt": text.format(100 + (7 * seed + number) % 900), f"{tier}_ok": good, **fields})
    return made


def train(
    tmp_path: Path, found: list[dict[str, Any]], *options: str, tiers: str = "code,talk"
) -> tuple[str, dict[str, dict[str, Estimate]]]:
    """Train on rows; return what was printed, and the estimates of a prompt of each kind."""
    path, out = tmp_path / "rows.jsonl", tmp_path / "scorer.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    result = runner.invoke(
        app, ["train", str(path), "--out", str(out), "--tiers", tiers, *options], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    loaded = scorer.load(out)
    return result.output, {
        name: dict(loaded.score(text.format(7)).estimates) for name, text in (("code", CODE), ("fact", FACT))
    }


def test_outcomes_of_one_tier_per_prompt_are_enough(tmp_path: Path) -> None:
    printed, estimates = train(tmp_path, rows(200, seed=1))

    assert estimates["code"]["code"].good > estimates["code"]["talk"].good + 0.4
    assert estimates["fact"]["talk"].good > estimates["fact"]["code"].good + 0.4
    assert "the score is not refitted: no prompt has both 'code_ok' and 'talk_ok'" in printed
    assert "P(good), cross-validated" in printed
    assert "Brier" in printed


def test_two_ordered_tiers_get_a_score_and_chances(tmp_path: Path) -> None:
    made = []
    for number in range(200):
        text = (CODE, FACT)[number % 2]
        made.append({"prompt": text.format(number), "small_ok": number % 2, "large_ok": number % 10 > 0})

    printed, estimates = train(tmp_path, made, tiers="small,large")

    assert "after" in printed
    assert estimates["code"]["large"].good > estimates["code"]["small"].good + 0.4


def test_lengths_of_answers_are_expected_by_tier_and_kind(tmp_path: Path) -> None:
    found = rows(300, seed=2)
    for row in found:
        tier = "code" if "code_ok" in row else "talk"
        if tier == "code":
            row["code_tokens"] = 200 if "Python" in row["prompt"] else 40

    _, estimates = train(tmp_path, found)

    lengths = [estimates[kind]["code"].tokens or 0 for kind in ("code", "fact")]
    assert lengths[0] > 120 > lengths[1]
    assert estimates["code"]["talk"].tokens is None


def test_no_tenant_decides_alone(tmp_path: Path) -> None:
    honest = [row for place in range(8) for row in rows(40, seed=place, tenant=f"tenant {place}")]
    false = rows(700, seed=50, reversed=True, tenant="false")

    printed, bounded = train(tmp_path, honest + false)
    _, trusting = train(tmp_path, honest + false, "--most-per-tenant", "1")

    assert "outcomes of false: 700 count as" in printed
    assert bounded["code"]["code"].good > bounded["code"]["talk"].good + 0.2
    assert trusting["code"]["code"].good < trusting["code"]["talk"].good


def test_no_tenant_decides_the_score_alone(tmp_path: Path) -> None:
    """A tenant reports most outcomes: that the larger tier gains elsewhere, or nothing at all."""

    def labelled(count: int, gains: str, tenant: str) -> list[dict[str, Any]]:
        texts = [(CODE, FACT)[place % 2] for place in range(count)]
        return [
            {
                "prompt": text.format(f"{tenant} {place}"),
                "small_ok": text != gains,
                "large_ok": 1,
                "tenant": tenant,
            }
            for place, text in enumerate(texts)
        ]

    honest = [row for place in range(8) for row in labelled(20, CODE, f"tenant {place}")]
    false = labelled(500, FACT, "false")
    worthless = [{**row, "small_ok": 1, "large_ok": 0} for row in false]

    def code_above_fact(*options: str, added: list[dict[str, Any]]) -> bool:
        train(tmp_path, honest + added, *options, tiers="small,large")
        loaded = scorer.load(tmp_path / "scorer.json")
        return loaded.score(CODE.format(7)).value > loaded.score(FACT.format(7)).value

    assert code_above_fact(added=false)
    assert not code_above_fact("--most-per-tenant", "1", added=false)
    assert "after" in train(tmp_path, honest + worthless, tiers="small,large")[0], "the score is refitted"


def test_callers_without_credentials_count_as_one_tenant(tmp_path: Path) -> None:
    """They choose the names of their tenants."""
    honest = [row for place in range(8) for row in rows(40, seed=place, tenant=f"tenant {place}")]
    false = [
        row
        for place in range(40)
        for row in rows(15, seed=50 + place, reversed=True, tenant=f"made up {place}", identity="anonymous")
    ]

    printed, estimates = train(tmp_path, honest + false)

    assert "outcomes of anonymous callers: 600 count as" in printed
    assert estimates["code"]["code"].good > estimates["code"]["talk"].good + 0.2


def test_recent_outcomes_count_more(tmp_path: Path) -> None:
    old = rows(300, seed=1, reversed=True, time="2024-01-01T00:00Z")
    new = rows(300, seed=2, time="2024-11-01T00:00Z")

    _, recent = train(tmp_path, old + new)
    _, all_alike = train(tmp_path, old + new, "--half-life-days", "100000")

    assert recent["code"]["code"].good > recent["code"]["talk"].good + 0.4
    assert abs(all_alike["code"]["code"].good - all_alike["code"]["talk"].good) < 0.2


def test_comparisons_by_a_judge_do_not_count_as_chances(tmp_path: Path) -> None:
    judged = rows(400, seed=3, reversed=True, source="judge")

    _, estimates = train(tmp_path, rows(200, seed=1) + judged)

    assert estimates["code"]["code"].good > estimates["code"]["talk"].good + 0.4


def test_conversations_are_read_from_their_messages(tmp_path: Path) -> None:
    found = rows(200, seed=1)
    talks = [
        {
            **{name: value for name, value in row.items() if name != "prompt"},
            "messages": [{"role": "user", "content": row["prompt"]}],
        }
        for row in found
    ]

    assert train(tmp_path, talks)[1] == train(tmp_path, found)[1]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"code_tokens": -1}, "'code_tokens' must be a number"),
        ({"code_tokens": "many"}, "'code_tokens' must be a number"),
        ({"code_tokens": math.inf}, "'code_tokens' must be a number"),
        ({"code_tokens": 10**400}, "too large"),
        ({"tenant": 5}, "'tenant' must be a string"),
        ({"time": "yesterday"}, "row 1"),
        ({"time": [1]}, "'time' must be"),
        ({"time": 10**400}, "too large"),
        ({"time": 1e13}, "'time' is in the future"),
        ({"messages": []}, "either 'prompt' or 'messages'"),
        ({"prompt": None, "messages": []}, "'messages' must be a list"),
    ],
)
def test_rows_with_other_content_are_named(fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "code_ok": 1, **fields}) + "\n")

    result = runner.invoke(
        app, ["train", str(path), "--out", str(tmp_path / "out.json"), "--tiers", "code,talk"]
    )

    assert result.exit_code == 2
    assert complaint in result.stderr


@pytest.mark.parametrize("tiers", ["code", "code,code", "code,,talk", ""])
def test_two_or_more_tiers_must_be_named(tiers: str, tmp_path: Path) -> None:
    result = runner.invoke(
        app, ["train", "rows.jsonl", "--out", str(tmp_path / "out.json"), "--tiers", tiers]
    )

    assert result.exit_code == 2
    assert "must name two or more different tiers" in result.stderr
