"""Bias, penalties and min_tokens: applied by definition, updated per token, and faulty for one row only."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine.interface import Fault, Memo, Row
from headrace.worker.engine.sampling import Sampler
from tests.worker.engine.rows import EOS, draw, ids_of, random_logits, row_of

PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.9},
    {"repetition_penalty": 0.8, "presence_penalty": -1.3, "frequency_penalty": 0.37},
    {"logit_bias": {3: 1.25, 40: -7.5}, "repetition_penalty": 1.1},
    {"min_tokens": 12, "stop_ids": frozenset({5, 9}), "frequency_penalty": 0.5},
    {},
]


def edited(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """Apply bias, penalties and min_tokens to one row, by their definitions."""
    scores, params = logits.clone(), row.params
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in set(row.ids[: row.stop]):
        if params.repetition_penalty != 1:
            penalty = torch.tensor(params.repetition_penalty)
            scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    for token, count in Counter(row.ids[row.prompt : row.stop]).items():
        frequency, presence = torch.tensor([params.frequency_penalty, params.presence_penalty])
        scores[token] -= frequency * float(count) + presence
    if row.stop - row.prompt < params.min_tokens:
        scores[[EOS, *params.stop_ids]] = float("-inf")
    return scores


@given(
    dice=st.randoms(use_true_random=False),
    choices=st.lists(st.sampled_from(PENALTIES), min_size=1, max_size=5),
    lengths=st.lists(st.integers(1, 150), min_size=5, max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_the_memo_kept_between_steps_changes_no_bit(
    dice: random.Random, choices: list[dict[str, Any]], lengths: list[int]
) -> None:
    """A sequence samples the same tokens if the memo is lost (failover) or steps are skipped (preemption)."""
    sampler = Sampler(frozenset({EOS}))
    histories = [[dice.randrange(50) for _ in range(length)] for length in lengths[: len(choices)]]
    prompts = [dice.randint(1, len(ids)) for ids in histories]
    memos = [Memo() for _ in choices]
    for step in range(12):
        members = sorted(dice.sample(range(len(choices)), dice.randint(1, len(choices))))
        memos = [Memo() if dice.random() < 0.1 else memo for memo in memos]
        logits = random_logits(len(members), 50, seed=step)
        rows = [
            dataclasses.replace(row_of(histories[i], prompt=prompts[i], seed=i, **choices[i]), memo=memos[i])
            for i in members
        ]

        scores, faults = sampler._edit(logits, rows)
        tokens = sampler.sample(logits, rows)

        assert not faults
        for index, (i, row) in enumerate(zip(members, rows, strict=True)):
            assert torch.equal(scores[index], edited(logits[index], row))
            histories[i].append(ids_of(tokens)[index])


class CountingList(list[int]):
    """Counts how many of its ids are read."""

    read = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.read += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self) -> Any:
        raise AssertionError("the whole history is read")


@pytest.mark.parametrize("params", PENALTIES, ids=str)
def test_a_step_reads_only_the_new_ids(params: dict[str, Any]) -> None:
    sampler = Sampler(frozenset({EOS}))
    logits, memo = random_logits(1, 50), Memo()
    ids = CountingList([1 + i % 49 for i in range(3000)])
    for _ in range(20):
        before = ids.read
        sampler.sample(logits, [dataclasses.replace(row_of(ids, prompt=1000, **params), memo=memo)])
        ids.append(7)

        if len(ids) > 3001:
            assert ids.read - before <= 2


INVALID: list[dict[str, Any]] = [
    {"logit_bias": {50: 1.0}},
    {"logit_bias": {4_000_000_000: 1.0}},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {1: "much"}},
    {"repetition_penalty": "much"},
    {"frequency_penalty": None, "presence_penalty": 1.0},
    {"temperature": None},
    {"top_p": None},
    {"min_p": "much"},
    {"seed": None},
    {"min_tokens": None},
]


@pytest.mark.parametrize("invalid", INVALID, ids=str)
def test_parameters_that_cannot_be_applied_end_only_their_row(invalid: dict[str, Any]) -> None:
    logits = random_logits(4, 50)
    rows = [
        row_of(seed=1, top_p=0.9, logprobs=True),
        row_of(**{"seed": 2, **invalid}),
        row_of(seed=3, repetition_penalty=1.2, min_tokens=9),
        row_of(temperature=0.0),
    ]
    good = [0, 2, 3]
    expected = [draw(logits[i : i + 1], [rows[i]])[0] for i in good]

    tokens = draw(logits, rows)

    assert [tokens[i] for i in good] == expected
    assert isinstance(tokens[1], Fault)


def test_end_ids_outside_the_vocabulary_are_ignored() -> None:
    sampler = Sampler(frozenset({EOS, 50, 4_000_000_000, -1}))
    logits = random_logits(3, 50)
    rows = [row_of(seed=i, min_tokens=9, stop_ids=frozenset({3, 99})) for i in range(2)]
    rows.append(row_of(seed=2))
    tokens = sampler.sample(logits, rows)

    assert not {EOS, 3} & set(ids_of(tokens[:2]))
    assert tokens[2] == draw(logits[2:], rows[2:])[0]


def test_an_id_outside_the_vocabulary_in_the_history_ends_only_its_row() -> None:
    logits = random_logits(2, 50)
    rows = [row_of((1, 2, 50), repetition_penalty=1.1), row_of((1, 2, 3), repetition_penalty=1.1)]

    tokens = draw(logits, rows)

    assert isinstance(tokens[0], Fault)
    assert tokens[1] == draw(logits[1:], rows[1:])[0]
