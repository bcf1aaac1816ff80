"""Mixtures leave out whole kinds of prompts, and open requests are measured by what a fit has not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.routing.data import Family
from benchmarks.routing.kinds import KINDS, requests
from benchmarks.routing.mixtures import drawn, left_out, measured, own
from benchmarks.routing.train import fit
from headrace.routing.scoring import scorer


def family(*gains: float) -> Family:
    return Family(["ask"] * len(gains), 1 - np.array(gains), np.ones(len(gains)), [""] * len(gains))


def test_a_family_is_left_out_with_those_of_its_kind() -> None:
    assert left_out(["rb_mbpp", "mmlu"]) == {"rb_mbpp", "mmlu", "nine/mbpp", "nine/humaneval"}


def test_a_mixture_has_six_families_and_is_the_same_every_time() -> None:
    names, sizes = drawn(3)

    assert len(set(names)) == len(sizes) == 6
    assert (names, sizes) == drawn(3)


def test_a_score_that_puts_the_families_in_order_is_as_good_as_their_true_gains() -> None:
    low, high = family(0.0, 0.2), family(0.6, 0.8)

    score, length, known = measured([(low, np.zeros(2)), (high, np.ones(2))])

    assert score == pytest.approx(known)
    assert length == pytest.approx(0.5)
    assert known > 0.6


def test_half_of_the_requests_are_unknown_to_a_fit() -> None:
    assert sorted(own(0).prompts + own(1).prompts) == sorted(requests("open"))
    everything, half = fit({}), fit({}, skipped=0)

    assert not np.allclose(everything.gate, half.gate)


def test_preference_moves_open_requests_alone() -> None:
    model = fit({})
    correct, preferred = model.aimed("correctness"), model.aimed("preference")

    moved = np.flatnonzero(
        np.abs(preferred.heads - correct.heads).sum(axis=1) + abs(preferred.head_bias - correct.head_bias)
    )
    assert {KINDS[place] for place in moved} == {"open", "chore"}


def test_both_objectives_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "scorer.json"
    scorer.save(fit({}), path)

    values = [
        scorer.load(path, objective).score("How do vaccines work?").value for objective in scorer.OBJECTIVES
    ]
    assert values[0] < values[1] < values[2]
