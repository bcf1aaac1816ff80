"""The heads of tiers survive their file, and files with other content are rejected."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.routing.artifact import BadArtifact
from headrace.routing.scoring import prompt_features, scorer
from headrace.routing.scoring.score import fingerprint
from headrace.routing.success.estimate import Estimate
from headrace.routing.success.heads import Heads

SHIPPED = scorer.load().model
FEATURES, KINDS = len(prompt_features.NAMES), len(SHIPPED.kinds)


def heads(tokens: float = math.nan) -> Heads:
    rng = np.random.default_rng(0)
    return Heads(
        tiers=("small", "code"),
        weights=rng.normal(size=(2, FEATURES + KINDS)).round(5),
        bias=np.array([0.25, -0.5]),
        tokens=np.full((2, KINDS), tokens),
        rows=(50, 70),
    )


def saved(tmp_path: Path, made: Heads) -> Path:
    path = tmp_path / "scorer.json"
    scorer.save(replace(SHIPPED, tiers=made), path)
    return path


def test_a_scorer_with_heads_estimates_each_tier_and_scores_as_before(tmp_path: Path) -> None:
    loaded = scorer.load(saved(tmp_path, heads(tokens=120.0)))
    text = "Write a Python function that merges two lists."

    score = loaded.score(text)

    features = scorer.read(text)
    expected = heads().good(np.concatenate([features, SHIPPED.kinds_of(features)]))
    assert [score.estimates[tier].good for tier in ("small", "code")] == pytest.approx(expected.tolist())
    assert score.estimates["code"].tokens == pytest.approx(120.0)
    assert score.value == pytest.approx(scorer.load().score(text).value, abs=1e-4)
    assert scorer.load().score(text).estimates == {}


def test_unknown_lengths_stay_unknown(tmp_path: Path) -> None:
    estimates = scorer.load(saved(tmp_path, heads())).score("Hello!").estimates

    assert [estimate.tokens for estimate in estimates.values()] == [None, None]


def test_an_estimate_is_never_certain() -> None:
    sure = Heads(("a",), np.full((1, 3), 100.0), np.zeros(1), np.full((1, 1), math.nan), (10,))

    found = sure.estimates(np.array([1.0, 1.0]), np.array([1.0]))

    assert 0.99 < found["a"].good < 1
    assert found == {"a": Estimate(found["a"].good, None)}


def test_other_heads_have_another_fingerprint(tmp_path: Path) -> None:
    assert fingerprint(scorer.load(saved(tmp_path, heads()))) != fingerprint(scorer.load())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tiers": {}}, "tiers"),
        ({"tiers": [1]}, "tiers"),
        ({"tiers": {"a": 1}}, "not a scorer"),
        ({"tiers": {"a": {"rows": 1, "bias": 0, "head": [1.0], "tokens": []}}}, "wrong number"),
        (
            {"tiers": {"a": {"rows": 1, "bias": math.inf, "head": [0.0] * (FEATURES + KINDS), "tokens": []}}},
            "finite",
        ),
        (
            {
                "tiers": {
                    "a": {"rows": 1, "bias": 0, "head": [0.0] * (FEATURES + KINDS), "tokens": [-1.0] * KINDS}
                }
            },
            "0 or more",
        ),
    ],
)
def test_a_file_with_unusable_heads_is_rejected(
    change: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "scorer.json"
    path.write_text(json.dumps(json.loads(scorer.SHIPPED.read_text()) | change))

    with pytest.raises(BadArtifact, match=complaint):
        scorer.load(path)
