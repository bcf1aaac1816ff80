"""Log-probabilities are those of transformers, the same in every batch, and ties go to the smaller id."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine import torch_engine
from headrace.worker.engine.interface import Fault, PromptLogprobs, Result, Row, SamplingParams, Token
from headrace.worker.engine.likelihoods import LEAST, likelihoods
from headrace.worker.engine.torch_engine import TorchEngine
from tests.worker.engine.conftest import VOCABULARY
from tests.worker.engine.rows import draw, random_logits, row_of
from tests.worker.engine.test_torch_engine import Engine, Network, blocks_of, embedding_of, prompt_of

PARAMS = SamplingParams(
    seed=3,
    max_tokens=9,
    temperature=1.3,
    top_k=4,
    logit_bias={5: 9.0},
    logprobs=True,
    top_logprobs=7,
    prompt_logprobs=5,
)


def by_definition(logits: torch.Tensor, most: int) -> list[list[int]]:
    """Return the most likely tokens, most likely first, of equal ones the smallest ids."""
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    return [[int(id) for id in row[:most]] for row in order.tolist()]


@given(
    vocabulary=st.sampled_from([1, 13, 20, 16, 300, 1000]),
    most=st.integers(0, 20),
    places=st.integers(1, 5),
    seed=st.integers(0, 99),
    levels=st.sampled_from([1, 3, 100_000]),
)
@settings(max_examples=60, deadline=None)
def test_the_most_likely_tokens_come_in_order_and_ties_by_id(
    vocabulary: int, most: int, places: int, seed: int, levels: int
) -> None:
    logits = (random_logits(places, vocabulary, seed=seed) * levels / 9).round() / levels
    ids = [random.Random(seed + place).randrange(vocabulary) for place in range(places)]

    found = likelihoods(logits, ids, most)

    expected = torch.log_softmax(logits.double(), -1)
    assert found.top_ids.tolist() == by_definition(logits, most)
    assert found.finite.all()
    own = expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
    np.testing.assert_allclose(found.logprobs, own, atol=2e-5, rtol=1e-6)
    for place, id in enumerate(ids):
        top = found.top(place, most)
        assert (
            dict(zip(top.ids, top.logprobs, strict=True)).get(id, found.logprobs[place])
            == (found.logprobs[place])
        )


def test_a_place_is_the_same_alone_and_among_others() -> None:
    logits = random_logits(9, 1000)
    together = likelihoods(logits, range(9), 20)

    for place in range(9):
        alone = likelihoods(logits[place : place + 1], [place], 3)
        assert alone.top(0, 3) == together.top(place, 3)
        assert alone.logprobs[0] == together.logprobs[place]


def test_impossible_tokens_have_a_finite_logprob_and_only_logits_that_are_not_numbers_fail() -> None:
    logits = random_logits(3, 30)
    logits[0, 2:] = float("-inf")
    logits[1, 7] = float("nan")

    found = likelihoods(logits, [4, 0, 0], 5)

    assert found.finite.tolist() == [True, False, True]
    assert found.logprobs[0] == LEAST
    assert list(found.top(0, 5).logprobs[2:]) == [float(LEAST)] * 3
    assert found.top(0, 5).ids[2:] == [2, 3, 4]


def test_sampling_reports_the_distribution_before_filters_with_the_bits_of_the_token() -> None:
    logits = random_logits(3, 200)
    rows = [
        row_of(seed=1, top_k=1, temperature=3.0, logit_bias={9: 50.0}, logprobs=True, top_logprobs=20),
        row_of(seed=2),
        row_of(seed=3, temperature=0.0, logprobs=True, top_logprobs=2),
    ]

    biased, plain, greedy = draw(logits, rows)

    assert isinstance(biased, Token)
    assert isinstance(greedy, Token)
    assert biased.top is not None
    assert greedy.top is not None
    assert biased.id == 9
    assert biased.top.ids == by_definition(logits[:1], 20)[0]
    assert isinstance(plain, Token)
    assert plain.top is None
    assert (greedy.top.ids[0], greedy.top.logprobs[0]) == (greedy.id, greedy.logprob)
    assert len(greedy.top.ids) == 2


def test_a_logit_that_is_not_a_number_fails_the_row_though_a_ban_hides_it_from_sampling() -> None:
    logits = random_logits(2, 30)
    logits[0, 0] = float("nan")  # the end of turn
    banned = row_of(min_tokens=5, top_logprobs=1, logprobs=True)

    first, second = draw(logits, [banned, banned])

    assert isinstance(first, Fault)
    assert isinstance(second, Token)


def parts_of(
    engine: TorchEngine,
    ids: Sequence[int],
    borders: Sequence[int],
    *,
    which: int = 0,
    others: Callable[[], Sequence[Row]] = list,
    params: SamplingParams = PARAMS,
) -> tuple[list[float], list[Any], Token]:
    """Compute a prompt in chunks that end at *borders* and at its end; return its scores and the token."""
    logprobs: list[float] = []
    top: list[Any] = []
    start = 0
    for stop in (*borders, len(ids)):
        scored = range(start + 1, min(stop + 1, len(ids)))
        row = Row(
            blocks_of(engine, which),
            start,
            stop,
            ids,
            len(ids),
            stop == len(ids),
            params,
            scored=scored,
        )
        result: Result = engine.step([*others(), row])[-1]
        part = result.prompt if isinstance(result, Token) else result
        if scored:
            assert isinstance(part, PromptLogprobs)
            assert part.offset == start + 1
            assert len(part.logprobs) == len(part.top) == len(scored)
            logprobs += part.logprobs
            top += part.top
        else:
            assert part is None
        start = stop
    assert isinstance(result, Token)
    return logprobs, top, replace(result, prompt=None)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_prompts_have_the_log_probabilities_of_a_whole_pass_of_transformers(
    architecture: str, tiny_engine: Engine, tiny_network: Network
) -> None:
    """Soft caps and scales after the layers count too."""
    engine, ids = tiny_engine(architecture), prompt_of(150)
    with torch.inference_mode():
        reference = torch.log_softmax(tiny_network(architecture)(torch.tensor([ids])).logits[0], -1)
    expected = reference[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    logprobs, top, token = parts_of(engine, ids, [])

    np.testing.assert_allclose(logprobs, expected, atol=1e-4)
    np.testing.assert_allclose([one.logprobs for one in top], reference[:-1].topk(5).values, atol=1e-4)
    assert token.top is not None
    np.testing.assert_allclose(token.top.logprobs, reference[-1].topk(7).values, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_scores_are_bit_identical_in_chunks_in_batches_and_in_slices_of_any_size(
    architecture: str, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ids, dice = tiny_engine(architecture), prompt_of(140), random.Random(0)
    if not engine.model.exact:
        pytest.skip("this machine's kernels are not exact")
    whole = parts_of(engine, ids, [])

    def others() -> list[Row]:
        other = prompt_of(dice.randint(2, 90), seed=dice.randint(0, 9))
        plain = replace(PARAMS, prompt_logprobs=None, top_logprobs=0)
        rows = [
            Row(blocks_of(engine, 1), 0, len(other), other, len(other), True, plain),
            Row(
                blocks_of(engine, 2),
                0,
                len(other),
                other,
                len(other),
                False,
                PARAMS,
                scored=range(1, len(other)),
            ),
        ]
        return rows[: dice.randint(1, 2)]

    for borders, size in (([1, 2, 33, 64, 139], 64), ([70], 7), ([139], 1), ([], 200)):
        monkeypatch.setattr(torch_engine, "SCORED_TOKENS", size)
        assert parts_of(engine, ids, borders, others=others) == whole


def test_a_prompt_of_which_a_part_was_scored_before_is_scored_from_there(tiny_engine: Engine) -> None:
    """As after a preemption: the first tokens are computed again, and not reported again."""
    engine, ids = tiny_engine(), prompt_of(40)
    logprobs, top, _ = parts_of(engine, ids, [])

    (part,) = engine.step([Row(blocks_of(engine, 1), 0, 30, ids, 40, False, PARAMS, scored=range(17, 31))])

    assert part == PromptLogprobs(17, logprobs[16:30], top[16:30])


def test_no_most_likely_tokens_are_found_for_a_prompt_that_asks_for_0(tiny_engine: Engine) -> None:
    engine, ids = tiny_engine(), prompt_of(9)
    row = Row(blocks_of(engine, 0), 0, 9, ids, 9, False, replace(PARAMS, prompt_logprobs=0))

    (part,) = engine.step([replace(row, scored=range(1, 9))])

    assert isinstance(part, PromptLogprobs)
    assert (len(part.logprobs), part.top) == (8, ())
    assert engine.step([row]) == [None]


def test_a_prompt_whose_logits_are_not_finite_fails_alone(tiny_engine: Engine) -> None:
    engine = tiny_engine("phi3")
    embedding_of(engine).weight.data[9] = float("nan")
    rows = [
        Row(blocks_of(engine, which), 0, 4, ids, 6, False, PARAMS, scored=range(1, 5))
        for which, ids in enumerate(([3, 4, 9, 4, 4, 4], [3, 4, 5, 4, 4, 4]))
    ]

    broken, fine = engine.step(rows)

    assert isinstance(broken, Fault)
    assert isinstance(fine, PromptLogprobs)


def test_engines_announce_what_they_compute(tiny_engine: Engine) -> None:
    assert tiny_engine().model.features == ("logprobs", "top_logprobs", "prompt_logprobs")
    assert tiny_engine("phi3").model.vocabulary_size == VOCABULARY
    assert tiny_engine("phi3").model.features == ("logprobs", "top_logprobs", "prompt_logprobs")
