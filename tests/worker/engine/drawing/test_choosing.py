"""Tokens drawn with torch operations are those of the engine's sampler, in every bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine import fixed_math, noise
from headrace.worker.engine.drawing import arithmetic, choosing
from headrace.worker.engine.drawing.choosing import Filters, choose
from headrace.worker.engine.interface import Row
from tests.worker.engine.rows import draw, ids_of, random_logits, row_of

FILTERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.02, 0.7, 1.0, 4.0]),
        "top_k": st.sampled_from([0, 0, 1, 3, 40, 5000]),
        "top_p": st.sampled_from([1.0, 1.0, 0.05, 0.6, 0.95]),
        "min_p": st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
        "seed": st.integers(0, 2**64 - 1),
    }
)


def chosen(logits: torch.Tensor, rows: list[Row]) -> list[int]:
    seeds = np.array([row.params.seed for row in rows], np.uint64)
    keys = noise.noise_keys(seeds, np.array([row.stop for row in rows], np.uint64))
    filters = Filters.of([row.params for row in rows], logits.shape[1], logits.device)
    return choose(logits, filters, torch.from_numpy(keys)).tolist()


@given(
    params=st.lists(FILTERS, min_size=1, max_size=5),
    length=st.integers(1, 5),
    vocabulary=st.sampled_from([7, 64, 1500, 3000]),
    spread=st.sampled_from([0.0, 0.3, 2.0, 30.0]),
    coarse=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_tokens_are_those_of_the_sampler(
    params: list[dict[str, Any]], length: int, vocabulary: int, spread: float, coarse: bool, seed: int
) -> None:
    """Also with ties, and where the likeliest thousand tokens do not suffice."""
    logits = random_logits(len(params), vocabulary, seed=seed, spread=spread)
    if coarse:
        logits = logits.round()
    rows = [row_of(range(length), **own) for own in params]

    assert chosen(logits, rows) == ids_of(draw(logits, rows))


@pytest.mark.parametrize("numbers", [1, 2 * 64, 1 << 20])
def test_a_row_does_not_depend_on_how_many_are_drawn_at_a_time(
    numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "CPU_NUMBERS", numbers)
    logits = random_logits(6, 64)
    rows = [row_of(seed=index, top_k=5 * (index % 2)) for index in range(6)]

    together = chosen(logits, rows)

    assert together == [chosen(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]


def test_the_arithmetic_has_the_bits_of_its_definition() -> None:
    random = np.random.default_rng(1)
    below = -np.abs(random.standard_normal(100_000) * 40).astype(np.float32)
    below[:4] = 0, -np.inf, fixed_math.EXP_LEAST, -1
    keys = noise.noise_keys(np.array([0, 2**64 - 1], np.uint64), np.array([3, 2**40], np.uint64))
    ids = np.arange(100_000, dtype=np.int32)
    positive = np.exp(below[4:]).clip(1e-30)

    drawn = arithmetic.gumbel(torch.from_numpy(keys), torch.from_numpy(ids[None])).numpy()

    assert np.array_equal(arithmetic.weight(torch.from_numpy(below)).numpy(), fixed_math.weight(below))
    assert np.array_equal(arithmetic.log(torch.from_numpy(positive)).numpy(), fixed_math.log(positive))
    assert np.array_equal(drawn, noise.gumbel(keys, ids[None]))
