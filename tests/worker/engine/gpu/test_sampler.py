"""Sampling on the device gives the tokens of sampling on the CPU, though the host knows none of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine.gpu.filling import masked_rows
from headrace.worker.engine.gpu.sampler import DeviceSampler, read_tokens
from headrace.worker.engine.gpu.step_inputs import StepInputs, StepShape, zeros
from headrace.worker.engine.grammar.constraints import Constraints
from headrace.worker.engine.interface import Fault, Result, Row, Token
from headrace.worker.engine.noise import noise_key
from headrace.worker.engine.sampling import Sampler
from tests.worker.engine.gpu.device import DEVICE
from tests.worker.engine.grammar.cases import letters, regex
from tests.worker.engine.rows import EOS, draw, kept_by_definition, random_logits, row_of

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"top_k": 3, "temperature": 1.5},
    {"top_p": 0.6, "logprobs": True},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.01, "temperature": 2.0},
    {"repetition_penalty": 1.7, "temperature": 0.0},
    {"repetition_penalty": 0.8, "presence_penalty": -1.3, "frequency_penalty": 0.37, "top_p": 0.9},
    {"logit_bias": {3: 5.0, 36: -2.0, 17: 100.0}, "logprobs": True, "temperature": 0.0},
    {"min_tokens": 3, "stop_ids": frozenset({1, 2}), "logit_bias": {1: 90.0, 30: 80.0}, "temperature": 0.3},
]


def sampler_of(slots: int, vocabulary: int, *, candidates: int = 64, block: int = 0) -> DeviceSampler:
    block = block or (32 if vocabulary < 64 else 128 if vocabulary < 512 else 512)
    return DeviceSampler(slots, vocabulary, frozenset({EOS}), DEVICE, block=block, candidates=candidates)


def step_of(rows: Sequence[Row], slots: Sequence[int], *, padding: int = 0, spare: int = 0) -> StepInputs:
    """Return the inputs of a step; only those that a sampler reads are set."""
    count = len(rows) + padding
    step = zeros(StepShape(count, count, 1), DEVICE)
    step.slots.fill_(spare)
    for index, (row, slot) in enumerate(zip(rows, slots, strict=True)):
        step.slots[index], step.stops[index], step.samples[index] = slot, row.stop, int(row.sample)
        step.keys[index] = torch.tensor(noise_key(row.params.seed, row.stop), dtype=torch.int32)
    return step


def draw_on_device(
    sampler: DeviceSampler, logits: torch.Tensor, rows: Sequence[Row], slots: Sequence[int] | None = None
) -> list[Result]:
    """Sample the rows of sequences that were assigned before; *logits* may be on the host."""
    results = torch.full((3, len(rows)), -7, dtype=torch.int32, device=DEVICE)
    step = step_of(rows, range(len(rows)) if slots is None else slots)
    sampler.draw(logits.to(DEVICE), step, results)
    return read_tokens(results.cpu(), rows)


def begin(sampler: DeviceSampler, rows: Sequence[Row]) -> None:
    for slot, row in enumerate(rows):
        assert sampler.assign(slot, row) is None


def following(row: Row, token: Token | Fault) -> Row:
    assert isinstance(token, Token)
    return dataclasses.replace(row, ids=[*row.ids, token.id], stop=row.stop + 1)


def check_steps(sampler: DeviceSampler, rows: list[Row], steps: Sequence[torch.Tensor]) -> None:
    """Sample some steps on both devices, with parameters and ids that are uploaded before the first."""
    begin(sampler, rows)
    for logits in steps:
        expected = draw(logits, rows)
        assert draw_on_device(sampler, logits, rows) == expected
        assert sampler.latest[: len(rows)].tolist() == [
            token.id for token in expected if isinstance(token, Token)
        ]
        rows = [following(row, token) for row, token in zip(rows, expected, strict=True)]


@pytest.mark.parametrize(("candidates", "steps"), [(8, 1), (64, 3)])
def test_all_kinds_of_parameters_sample_the_tokens_of_the_cpu(candidates: int, steps: int) -> None:
    """Whether the likeliest tokens that filters examine first suffice or not."""
    rows = [row_of((1, 2, 2, 4, 9), prompt=3, seed=seed, **own) for seed, own in enumerate(PARAMS)]

    check_steps(
        sampler_of(len(rows), 37, candidates=candidates), rows,
        [random_logits(len(rows), 37, seed=seed, spread=1.5) for seed in range(steps)],
    )  # fmt: skip


@given(dice=st.randoms(use_true_random=False), vocabulary=st.sampled_from([37, 1100]))
@settings(max_examples=6)
def test_any_parameters_and_logits_sample_the_tokens_of_the_cpu(dice: random.Random, vocabulary: int) -> None:
    def params() -> dict[str, Any]:
        return {
            "temperature": dice.choice([0.0, 0.01, 0.7, 1.0, 10.0]),
            "top_k": dice.choice([0, 0, 1, 7, 50, 2**32 - 1]),
            "top_p": dice.choice([1.0, 1.0, 1e-6, 0.5, 0.999]),
            "min_p": dice.choice([0.0, 0.0, 1e-40, 0.05, 1.0]),
            "repetition_penalty": dice.choice([1.0, 0.01, 1.3, 10.0]),
            "presence_penalty": dice.choice([0.0, 2.0, -0.3]),
            "frequency_penalty": dice.choice([0.0, -2.0, 0.7]),
            "logit_bias": {dice.randrange(vocabulary): dice.uniform(-9, 9) for _ in range(dice.randrange(9))},
            "min_tokens": dice.choice([0, 4, 9]),
            "stop_ids": frozenset(dice.randrange(2 * vocabulary) for _ in range(dice.randrange(4))),
            "ignore_eos": dice.random() < 0.5,
            "logprobs": dice.random() < 0.5,
        }

    rows = [
        row_of(
            [dice.randrange(vocabulary) for _ in range(6)], prompt=dice.randint(1, 6),
            seed=dice.getrandbits(64), **params(),
        )
        for _ in range(2)
    ]  # fmt: skip
    spread = dice.choice([0.0, 1e-3, 1.0, 30.0])
    steps = [random_logits(2, vocabulary, seed=dice.randrange(100), spread=spread) for _ in range(2)]
    # Equal logits occur often in half precision.
    steps = [logits.to(dice.choice([torch.float32, torch.bfloat16])) for logits in steps]

    check_steps(sampler_of(2, vocabulary, candidates=dice.choice([16, 256])), rows, steps)


@pytest.mark.parametrize(("candidates", "ties"), [(4, False), (16, True), (64, True)])
def test_filters_keep_the_tokens_of_their_definition(candidates: int, ties: bool) -> None:
    """Whether the likeliest tokens suffice for top-k, for top-p, for both or for neither."""
    filters = [(k, p) for k in (0, 1, 6, 30, 36) for p in (1e-6, 0.6, 1.0) if k or p < 1]
    rows = [row_of(seed=1, top_k=k, top_p=p, min_p=1e-3) for k, p in filters]
    logits = random_logits(len(rows), 37, spread=1.0)
    if ties:
        logits = logits.mul(4).round().div(4)
    sampler = sampler_of(len(rows), 37, candidates=candidates)
    begin(sampler, rows)

    draw_on_device(sampler, logits, rows)

    scores = logits - logits.amax(-1, keepdim=True)
    kept = scores >= sampler._memory.thresholds[:, None].cpu()
    for own, score, row in zip(kept, scores.numpy(), rows, strict=True):
        assert own.tolist() == kept_by_definition(score, row.params).tolist()


def test_a_row_samples_the_same_token_alone_and_in_any_batch() -> None:
    logits = random_logits(4, 300)
    params: list[dict[str, Any]] = [{}, {"top_p": 0.8}, {"repetition_penalty": 1.4}, {"temperature": 0.0}]
    rows = [row_of(seed=7, logprobs=True, **own) for own in params]
    sampler = sampler_of(6, 300)

    begin(sampler, rows)
    together = draw_on_device(sampler, logits, rows)
    begin(sampler, rows)
    reversed_ = draw_on_device(sampler, logits.flip(0), rows[::-1], slots=[3, 2, 1, 0])
    begin(sampler, rows)
    alone = [draw_on_device(sampler, logits[i : i + 1], [row], slots=[i])[0] for i, row in enumerate(rows)]

    assert reversed_[::-1] == together
    assert alone == together


def test_rows_that_do_not_sample_and_padding_change_nothing() -> None:
    rows = [row_of(seed=1, repetition_penalty=1.4), row_of(seed=2), row_of(seed=3, top_k=4)]
    sampler = sampler_of(5, 37)
    begin(sampler, rows)
    sampler.latest.fill_(11)
    waiting = [rows[0], dataclasses.replace(rows[1], sample=False), rows[2]]
    logits = random_logits(5, 37)
    logits[[1, 3, 4]] = float("nan")
    results = torch.full((3, 5), -7, dtype=torch.int32, device=DEVICE)

    sampler.draw(logits.to(DEVICE), step_of(waiting, [0, 1, 2], padding=2, spare=5), results)

    expected = draw(logits[:3], rows)
    assert read_tokens(results.cpu(), waiting) == [expected[0], None, expected[2]]
    assert results[:, [1, 3, 4]].eq(0).all()
    assert sampler.latest[[1, 3, 4, 5]].tolist() == [11] * 4


def test_a_new_sequence_in_a_slot_starts_anew() -> None:
    sampler = sampler_of(1, 37)
    old = row_of((5, 6, 7), prompt=1, seed=1, frequency_penalty=2.0, logit_bias={9: 50.0}, min_tokens=50)
    check_steps(sampler, [old], [random_logits(1, 37, seed=seed) for seed in range(2)])

    for own in ({"frequency_penalty": 1.5, "repetition_penalty": 1.2}, {}):
        new = row_of((8, 8, 3), prompt=2, seed=2, temperature=0.0, **own)
        check_steps(sampler, [new], [random_logits(1, 37, seed=seed, spread=0.3) for seed in range(3)])


def test_all_ids_of_a_sequence_are_counted_when_it_begins_with_the_first_chunk_of_its_prompt() -> None:
    whole = row_of((1, 2, 3, 4, 5, 5), prompt=5, temperature=0.0, repetition_penalty=5.0)
    sampler = sampler_of(1, 37)
    logits = torch.linspace(1, 2, 37)[None].clone()
    logits[0, 5] = 6.0

    assert sampler.assign(0, dataclasses.replace(whole, stop=2, sample=False)) is None

    assert draw_on_device(sampler, logits, [whole]) == draw(logits, [whole]) != [Token(5)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"repetition_penalty": 1.1}])
def test_logits_that_are_not_finite_end_only_their_row(value: float, params: dict[str, Any]) -> None:
    rows = [row_of(seed=seed, logprobs=True, **params) for seed in range(3)]
    logits = random_logits(3, 37)
    logits[1, 17] = value
    if value == float("-inf"):
        logits[1] = value
        logits[2, :30] = value  # a row with some possible tokens
    sampler = sampler_of(3, 37)
    begin(sampler, rows)

    tokens = draw_on_device(sampler, logits, rows)

    assert isinstance(tokens[1], Fault)
    assert tokens == draw(logits, rows)


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures_do_not_overflow(temperature: float) -> None:
    params: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 2}]
    rows = [row_of(seed=seed, temperature=temperature, **own) for seed, own in enumerate(params)]

    check_steps(sampler_of(3, 37), rows, [random_logits(3, 37, spread=50.0)])


def test_logits_may_be_part_of_wider_rows_and_are_not_modified() -> None:
    rows = [row_of(seed=seed, repetition_penalty=1.3) for seed in range(2)]
    before = random_logits(2, 48)
    wide = before.to(DEVICE, copy=True)
    sampler = sampler_of(2, 37)
    begin(sampler, rows)

    assert draw_on_device(sampler, wide[:, :37], rows) == draw(before[:, :37].contiguous(), rows)
    assert torch.equal(wide.cpu(), before)


INVALID: list[dict[str, Any]] = [
    {"logit_bias": {37: 1.0}},
    {"logit_bias": {4_000_000_000: 1.0}},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {1: "much"}},
    {"logit_bias": dict.fromkeys(range(301), 1.0)},
    {"repetition_penalty": "much"},
    {"frequency_penalty": None, "presence_penalty": 1.0},
    {"temperature": None},
    {"top_k": None},
    {"top_p": None},
    {"min_p": "much"},
    {"min_tokens": None},
]


@pytest.mark.parametrize("invalid", INVALID, ids=lambda own: str(own)[:40])
def test_parameters_that_cannot_be_applied_are_a_fault(invalid: dict[str, Any]) -> None:
    sampler = sampler_of(1, 301 if len(invalid.get("logit_bias", ())) > 300 else 37)

    fault = sampler.assign(0, row_of(**invalid))

    assert isinstance(fault, Fault)
    assert "cannot be applied" in fault.message


def test_an_id_outside_the_vocabulary_is_a_fault_of_sequences_whose_ids_are_counted() -> None:
    sampler = sampler_of(2, 37)

    assert isinstance(sampler.assign(0, row_of((1, 2, 37), repetition_penalty=1.1)), Fault)
    assert isinstance(sampler.assign(0, row_of((1, 2, -1), presence_penalty=1.1)), Fault)
    assert sampler.assign(1, row_of((1, 2, 37))) is None


def test_a_sequence_with_a_pending_token_cannot_begin() -> None:
    with pytest.raises(ValueError, match="not complete"):
        sampler_of(1, 37).assign(0, dataclasses.replace(row_of(), pending=True))


def test_masks_sample_the_tokens_of_the_cpu() -> None:
    """With all kinds of parameters, more rows than masks, and a grammar that lifts the ban of min_tokens."""
    grammars = letters(37, end=EOS)
    constraints = Constraints(grammars, [EOS], threads=1)
    patterns = ["[ab]+", "", "a|[0-9]*", "", "[a-h]{2,}", "b", "", "[ab]*", "[0-9]", "a"]
    rows = [row_of((1, 2, 9), prompt=3, seed=seed, **own) for seed, own in enumerate(PARAMS)]
    rows.append(row_of((1, 2, 9, 1), prompt=3, seed=10, min_tokens=5))
    for row, pattern in zip(rows, [*patterns, "a"], strict=True):
        row.params = dataclasses.replace(row.params, grammar=regex(pattern) if pattern else "")
    logits = random_logits(len(rows), 37, seed=5, spread=2.0)
    logits[0, 20] = float("nan")
    expected = Sampler(frozenset({EOS}), grammars).sample(logits, rows)
    sampler = sampler_of(len(rows), 37)
    begin(sampler, rows)
    masked = masked_rows(rows)
    masks = sampler.restrict(lambda bits: constraints.compute(rows, masked, bits=bits))
    step = step_of(rows, range(len(rows)))
    for number, index in enumerate(masked):
        step.samples[index] = 2 + number
    results = torch.zeros((3, len(rows)), dtype=torch.int32, device=DEVICE)

    sampler.draw(logits.to(DEVICE), step, results)

    assert not masks.faults
    assert masks.lifted == {9, 10}, "of those with min_tokens, one allows only a stop id and one only the end"
    found = read_tokens(results.cpu(), rows)
    assert isinstance(found[0], Fault)
    assert [*map(bare, found)] == [*map(bare, expected)]
    assert found[10] == Token(EOS)


def bare(result: Result) -> object:
    """Return a result without the most likely tokens, which another kernel computes."""
    return dataclasses.replace(result, top=None) if isinstance(result, Token) else result
