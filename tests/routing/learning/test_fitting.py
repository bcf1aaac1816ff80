"""A refit improves the kinds of prompts that it has outcomes of, and keeps the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from headrace.routing.learning.fitting import refit, ridge, softmax
from headrace.routing.learning.tradeoff import Array, quality
from headrace.routing.scoring import prompt_features, scorer

shipped = scorer.load().model
FEATURES = len(prompt_features.NAMES)


def outcomes(prompts: list[str], hard: list[bool], seed: int) -> tuple[Array, Array, Array]:
    """Return features and noisy outcomes: hard prompts gain in 60 of 100 cases, the others in 5."""
    rng = np.random.default_rng(seed)
    gained = rng.random(len(prompts)) < np.where(hard, 0.6, 0.05)
    return (
        np.array([scorer.read(prompt) for prompt in prompts]),
        np.array(1.0 - gained, dtype=np.float64),
        np.ones(len(prompts)),
    )


def traffic(count: int, seed: int) -> tuple[list[str], list[bool]]:
    """Return requests of an application where those that the shipped scorer has for easier are hard."""
    rng = np.random.default_rng(seed)
    legal = "Summarize what the court said of the plaintiff, the contract and the statute in {} words."
    plain = "Summarize what the guests said of the kitchen, the garden and the weather in {} words."
    gains = shipped.gains(np.array([scorer.read(text.format(50)) for text in (plain, legal)]))
    easy, usual = (plain, legal) if gains[0] < gains[1] else (legal, plain)
    hard = [bool(rng.random() < 0.4) for _ in range(count)]
    return [(easy if flag else usual).format(rng.integers(20, 200)) for flag in hard], hard


def test_two_hundred_outcomes_of_new_traffic_improve_its_order() -> None:
    features, weak, strong = outcomes(*traffic(200, seed=1), seed=2)
    unseen, unseen_weak, unseen_strong = outcomes(*traffic(1000, seed=3), seed=4)

    fitted = refit(shipped, features, weak, strong)

    before = quality(shipped.gains(unseen), unseen_weak, unseen_strong).apgr
    after = quality(fitted.model.gains(unseen), unseen_weak, unseen_strong).apgr
    assert after > max(before, 0.5) + 0.1
    assert fitted.after.apgr > fitted.before.apgr


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_outcomes_that_are_pure_noise_hardly_move_the_order(seed: int) -> None:
    prompts, _ = traffic(200, seed)
    rng = np.random.default_rng(seed + 1)
    features = np.array([scorer.read(prompt) for prompt in prompts])
    fitted = refit(shipped, features, (rng.random(200) < 0.5).astype(float), np.ones(200)).model
    others = np.array(
        [
            scorer.read(text)
            for text in ("Hello!", "What is the capital of Peru?", "Solve $x^2 - 5x = 4$ for real x.")
        ]
    )

    assert shipped.gains(others).argsort().tolist() == [0, 1, 2]
    assert np.diff(fitted.gains(others)).min() > -0.01


def test_a_refit_learns_which_kind_of_prompt_gains() -> None:
    places = ("town", "lake", "street", "garden", "bridge")
    facts = [f"Who built the {place} in {year}?" for place in places for year in range(1900, 1940)]
    code = [f"Write a Python function that returns item {n} of a list." for n in range(200)]
    features = np.array([scorer.read(prompt) for prompt in facts + code])
    weak = np.array([0.0] * 200 + [1.0] * 200)  # against what the shipped model expects

    fitted = refit(shipped, features, weak, np.ones(400)).model

    assert shipped.gains(features[:200]).mean() < shipped.gains(features[200:]).mean()
    assert fitted.gains(features[:200]).mean() > fitted.gains(features[200:]).mean()


def test_a_kind_of_prompt_that_the_rows_do_not_contain_keeps_its_head() -> None:
    features, weak, strong = outcomes(*traffic(200, seed=1), seed=2)

    fitted = refit(shipped, features, weak, strong).model

    choices = shipped.kinds.index("choices")
    changes = np.abs(fitted.heads - shipped.heads).max(axis=1)
    assert changes[choices] < 0.2 * changes.max()


def test_a_refit_is_the_same_every_time() -> None:
    features, weak, strong = outcomes(*traffic(100, seed=1), seed=2)

    first, second = (refit(shipped, features, weak, strong).model for _ in range(2))

    assert (first.heads == second.heads).all()


def test_a_row_of_little_weight_counts_little() -> None:
    features, weak, strong = outcomes(*traffic(200, seed=1), seed=2)
    every = np.vstack([features, features])
    opposite = np.concatenate([weak, strong]), np.concatenate([strong, weak])
    light = np.repeat([1.0, 1e-9], 200)

    alone = refit(shipped, features, weak, strong).model.gains(features)
    weighted = refit(shipped, every, *opposite, weights=light).model.gains(features)

    # Cross-validation chooses among the same strengths, but for other folds.
    assert np.corrcoef(alone, weighted)[0, 1] > 0.95
    with pytest.raises(ValueError, match="no better"):
        refit(shipped, every, *opposite)


def test_too_few_rows_and_rows_without_a_gain_are_rejected() -> None:
    with pytest.raises(ValueError, match="too few"):
        refit(shipped, np.zeros((10, FEATURES)), np.zeros(10), np.ones(10))
    with pytest.raises(ValueError, match="no better"):
        refit(shipped, np.zeros((50, FEATURES)), np.ones(50), np.ones(50))


def test_ridge_finds_a_line_and_shrinks_it() -> None:
    features = np.random.default_rng(0).random((500, 3))
    target = features @ np.array([1.0, -2.0, 0.0]) + 0.5

    slopes, intercept = ridge(features, target, 1e-6)
    shrunk, _ = ridge(features, target, 1000.0)

    assert slopes == pytest.approx([1, -2, 0], abs=1e-3)
    assert intercept == pytest.approx(0.5, abs=1e-3)
    assert np.linalg.norm(shrunk) < 0.6 * np.linalg.norm(slopes)


def test_softmax_separates_labels() -> None:
    features = np.vstack([np.tile([1.0, 0.0], (30, 1)), np.tile([0.0, 1.0], (90, 1))])
    labels = np.array([0] * 30 + [1] * 90)

    weights, bias = softmax(features, labels, 2)

    assert ((features @ weights.T + bias).argmax(axis=1) == labels).all()


def test_a_refit_aims_at_what_its_outcomes_say() -> None:
    features, weak, strong = outcomes(*traffic(100, seed=1), seed=2)
    either = replace(shipped, preferred=shipped.heads + 1.0, preferred_bias=shipped.head_bias + 1.0)

    fitted = refit(either, features, weak, strong).model

    assert fitted.preferred is None
    assert fitted.aimed("correctness") is fitted
