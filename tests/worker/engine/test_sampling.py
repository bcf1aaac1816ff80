from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine import sampling
from headrace.worker.engine.interface import Fault, Row, Token
from headrace.worker.engine.noise import gumbel, noise_key
from tests.worker.engine.rows import EOS, draw, ids_of, kept_by_definition, random_logits, row_of


def transformers_distribution(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """Return one row's distribution after transformers' logits processors, in the order of `generate`."""
    params = row.params
    processors: Any = transformers.LogitsProcessorList()
    if params.logit_bias:
        bias: list[Any] = [[[token], value] for token, value in params.logit_bias.items()]
        processors.append(transformers.SequenceBiasLogitsProcessor(bias))
    if params.repetition_penalty != 1:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens:
        processors.append(
            transformers.MinNewTokensLengthLogitsProcessor(row.prompt, params.min_tokens, eos_token_id=EOS)
        )
    processors.append(transformers.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(transformers.MinPLogitsWarper(params.min_p))
    scores = processors(torch.tensor([list(row.ids)]), logits[None].clone())
    return torch.softmax(scores[0], dim=-1)


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.15},
    {"top_k": 6, "top_p": 0.8},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "temperature": 0.8, "min_p": 0.02},
    {"logit_bias": {4: 2.5, 7: -3.0}, "repetition_penalty": 1.3, "top_p": 0.9},
    {"min_tokens": 5, "temperature": 1.5},
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_sampled_tokens_follow_the_distribution_of_transformers(params: dict[str, Any]) -> None:
    """Over many seeds: no token outside the filters, and matching frequencies inside."""
    count, logits = 4000, random_logits(1, 13, seed=3)[0]
    expected = transformers_distribution(logits, row_of((1, 2, 2, 4, 9), **params))

    rows = [row_of((1, 2, 2, 4, 9), seed=seed, **params) for seed in range(count)]
    drawn = torch.bincount(torch.tensor(ids_of(draw(logits.expand(count, -1), rows))), minlength=13)

    assert drawn[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((drawn - count * expected)[kept] ** 2 / (count * expected)[kept]).sum().item()
    degrees = int(kept.sum()) - 1
    assert chi_square <= degrees + 4 * math.sqrt(2 * degrees) + 4


@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=6),
    filters=st.lists(st.sampled_from([*FILTERS, {"temperature": 0.0}]), min_size=6, max_size=6),
    lengths=st.lists(st.integers(1, 40), min_size=6, max_size=6),
    vocabulary=st.sampled_from([17, 64, 1500]),
    spread=st.sampled_from([0.1, 2.0, 30.0]),
)
@settings(max_examples=60, deadline=None)
def test_a_row_samples_the_same_token_alone_and_in_any_batch(
    seeds: list[int], filters: list[dict[str, Any]], lengths: list[int], vocabulary: int, spread: float
) -> None:
    logits = random_logits(len(seeds), vocabulary, spread=spread)
    rows = [
        row_of([1 + i % 9 for i in range(length)], seed=seed, prompt=length // 2, logprobs=True, **params)
        for seed, params, length in zip(seeds, filters, lengths, strict=False)
    ]

    together = draw(logits, rows)

    assert together == [draw(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert together == draw(logits.flip(0), rows[::-1])[::-1]


@given(
    seed=st.integers(0, 2**32),
    top_k=st.sampled_from([0, 1, 5, 8, 9, 40]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
    spread=st.sampled_from([0.01, 0.3, 3.0]),
)
@settings(max_examples=80, deadline=None)
def test_examining_few_candidates_first_changes_no_token(
    seed: int, top_k: int, top_p: float, min_p: float, spread: float
) -> None:
    logits = random_logits(4, 50, seed=seed % 1000, spread=spread)
    rows = [row_of(seed=seed + i, top_k=top_k, top_p=top_p, min_p=min_p) for i in range(4)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "CANDIDATES", 50)
        whole = draw(logits, rows)
        patch.setattr(sampling, "CANDIDATES", 8)
        assert draw(logits, rows) == whole


def token_by_definition(logits: torch.Tensor, row: Row) -> int:
    """Return the token of a row without penalties and biases: the greatest sum of score and noise."""
    x = logits.float().numpy()
    scores = (x - x.max()) / np.float32(row.params.temperature)
    key = np.array([noise_key(row.params.seed, row.stop)], np.int32)
    noisy = scores + gumbel(key, np.arange(len(x), dtype=np.int32)[None])[0]
    return int(np.where(kept_by_definition(scores, row.params), noisy, -np.inf).argmax())


@given(
    seed=st.integers(0, 2**64 - 1),
    top_k=st.sampled_from([0, 1, 5, 33, 400]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.9999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-40, 0.1, 1.0]),
    temperature=st.sampled_from([1e-3, 0.8, 3.0]),
    spread=st.sampled_from([0.0, 0.3, 3.0, 12.0]),
    vocabulary=st.sampled_from([1, 15, 16, 17, 300, 1500]),
)
@settings(max_examples=200)
def test_tokens_follow_from_the_definition_in_every_bit(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float, spread: float, vocabulary: int
) -> None:
    """Half precision makes ties: tokens as likely as the last one that a filter keeps are kept too."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = random_logits(3, vocabulary, seed=seed % 100, spread=spread).to(dtype)
        rows = [
            row_of(seed=seed + i, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
            for i in range(3)
        ]

        assert ids_of(draw(logits, rows)) == [
            token_by_definition(own, row) for own, row in zip(logits, rows, strict=True)
        ]


@given(
    steps=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, len(FILTERS) - 1)), min_size=1, max_size=4),
        min_size=2,
        max_size=6,
    )
)
@settings(max_examples=60)
def test_rows_sampled_before_change_no_token(steps: list[list[tuple[int, int]]]) -> None:
    """A sampler keeps the parameters of the last step's rows."""
    sampler = sampling.Sampler(frozenset({EOS}))
    known = {(seed, kind): row_of(seed=seed, **FILTERS[kind]) for step in steps for seed, kind in step}
    for index, step in enumerate(steps):
        logits = random_logits(len(step), 300, seed=index)
        rows = [known[own] for own in step]
        if index % 2:  # equal parameters that are other objects
            rows = [row_of(seed=seed, **FILTERS[kind]) for seed, kind in step]

        assert ids_of(sampler.sample(logits, rows)) == ids_of(draw(logits, rows))


def test_the_number_of_threads_changes_no_token() -> None:
    logits = random_logits(40, 1500)
    rows = [row_of(seed=seed, logprobs=True, **FILTERS[seed % len(FILTERS)]) for seed in range(40)]
    before = torch.get_num_threads()

    try:
        torch.set_num_threads(1)
        alone = draw(logits, rows)
        torch.set_num_threads(4)
        assert draw(logits, rows) == alone
    finally:
        torch.set_num_threads(before)


def test_greedy_takes_the_most_likely_token_whatever_the_seed() -> None:
    logits = random_logits(5, 300)

    for seed in (0, 2**64 - 1):
        rows = [row_of(seed=seed, temperature=0.0, top_k=3, top_p=0.5) for _ in range(5)]
        assert ids_of(draw(logits, rows)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature: float) -> None:
    logits = random_logits(3, 40, spread=50.0)

    filters: list[dict[str, Any]] = [{}, {"top_p": 0.9}]
    for params in filters:
        rows = [row_of(seed=i, temperature=temperature, **params) for i in range(3)]
        assert ids_of(draw(logits, rows)) == logits.argmax(-1).tolist()


def test_positions_have_different_noise() -> None:
    logits = torch.zeros(200, 1000)
    here = ids_of(draw(logits, [row_of([1] * (5 + i)) for i in range(200)]))
    there = ids_of(draw(logits, [row_of([1] * (6 + i)) for i in range(200)]))

    assert here[1:] == there[:-1]
    assert len(set(here)) > 150


def test_frequency_and_presence_count_only_the_answer() -> None:
    """logit - frequency x count - presence, as OpenAI's API defines them; the prompt does not count."""
    logits = torch.tensor([[0.0, 5.0, 4.0, 3.0, 2.0]])
    ids = [1, 1, 1, 2, 2, 3]

    def greedy(**params: Any) -> int:
        return ids_of(draw(logits, [row_of(ids, prompt=3, temperature=0.0, **params)]))[0]

    assert greedy(frequency_penalty=2.0) == 1
    assert greedy(frequency_penalty=2.0, repetition_penalty=5.0) == 4
    assert greedy(presence_penalty=-2.0) == 2
    assert greedy(presence_penalty=-0.5, frequency_penalty=-0.5) == 2


@pytest.mark.parametrize(
    ("answered", "ignore_eos", "ends"),
    [(0, False, False), (2, False, False), (3, False, True), (0, True, True)],
)
def test_a_turn_cannot_end_before_min_tokens_unless_its_end_is_ignored(
    answered: int, ignore_eos: bool, ends: bool
) -> None:
    logits = torch.tensor([[9.0, 1.0, 1.0, 1.0]])
    for temperature in (0.0, 1.0):
        row = row_of(
            [1] * (4 + answered), prompt=4, min_tokens=3, ignore_eos=ignore_eos, temperature=temperature
        )
        assert (ids_of(draw(logits, [row])) == [EOS]) == ends


def test_ids_that_end_the_answer_are_not_sampled_before_min_tokens() -> None:
    logits = torch.tensor([[1.0, 9.0, 5.0, 1.0]])

    def drawn(answered: int) -> list[int]:
        row = row_of(
            [1] * (4 + answered),
            prompt=4,
            min_tokens=3,
            ignore_eos=True,
            temperature=0.0,
            stop_ids=frozenset({1}),
        )
        return ids_of(draw(logits, [row]))

    assert drawn(2) == [2]
    assert drawn(3) == [1]


def test_log_probabilities_are_the_models_own() -> None:
    """Before temperature, filters and penalties, and only for rows that ask for them."""
    logits = random_logits(3, 60)
    rows = [
        row_of(logprobs=True, temperature=0.0),
        row_of(logprobs=True, temperature=0.3, top_k=2, repetition_penalty=2.0, logit_bias={5: 9.0}),
        row_of(),
    ]

    tokens = draw(logits, rows)

    expected = torch.log_softmax(logits, dim=-1)
    for index in (0, 1):
        token = tokens[index]
        assert isinstance(token, Token)
        assert token.logprob == pytest.approx(expected[index, token.id].item(), abs=1e-5)
    assert isinstance(tokens[2], Token)
    assert tokens[2].logprob is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"repetition_penalty": 1.1}])
def test_logits_that_are_not_finite_end_only_their_row(value: float, params: dict[str, Any]) -> None:
    logits = random_logits(3, 50)
    rows = [row_of(seed=i, **params) for i in range(3)]
    expected = draw(logits, rows)
    logits[1, 17] = value

    tokens = draw(logits, rows)

    assert isinstance(tokens[1], Fault)
    assert (tokens[0], tokens[2]) == (expected[0], expected[2])


def test_a_row_without_any_possible_token_is_a_fault() -> None:
    assert isinstance(draw(torch.full((1, 9), float("-inf")), [row_of()])[0], Fault)


def test_bfloat16_logits_give_the_same_tokens_as_their_float32_values() -> None:
    logits = random_logits(4, 200).bfloat16()
    rows = [row_of(seed=i, temperature=i / 2, logprobs=True) for i in range(4)]

    assert draw(logits, rows) == draw(logits.float(), rows)


def test_the_noise_is_the_same_on_every_machine_and_in_every_release() -> None:
    """A newer worker may resume an answer, so these numbers must never change."""
    assert noise_key(0, 0) == (-1492722385, 1293516399)
    assert noise_key(2**64 - 1, 4096) == (-2071266700, -490840291)
    noise = gumbel(np.array([(-1492722385, 1293516399)], np.int32), np.array([[0, 1, 49151]], np.int32))
    assert noise[0].view(np.int32).tolist() == [-1097798495, 1066376414, 1033697463]


def test_uniforms_fill_their_range_evenly_over_tokens_seeds_and_positions() -> None:
    ids = np.arange(256, dtype=np.int32)[None]
    keys = [noise_key(seed, position) for seed in range(32) for position in range(32)]

    uniform = torch.exp(-torch.exp(-torch.from_numpy(gumbel(np.array(keys, np.int32), ids))))

    counts = torch.histc(uniform, 64, 0, 1)
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
    assert chi_square < 63 + 4 * math.sqrt(2 * 63)
    grid = uniform - 0.5
    for shifted in (grid.roll(1, 0), grid.roll(1, 1), grid.roll(32, 0)):
        assert abs((grid * shifted).mean().item()) < 4 / 12 / math.sqrt(grid.numel())
