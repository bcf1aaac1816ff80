"""An engine whose tokens we draw gives the answers of our own sampler, whatever else is in its batch."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine.drawing.batch import Drawn, DrawnBatch
from headrace.worker.engine.interface import Row, SamplingParams, Token
from headrace.worker.engine.sampling import Sampler
from tests.worker.engine.grammar.cases import letters, regex
from tests.worker.engine.rows import EOS, random_logits, row_of

SIZE = 53  # not a multiple of the words of masks
GRAMMARS = letters(SIZE, end=EOS)
PROMPT = [1, 2, 3]
LONGEST = 8
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"top_k": 3, "temperature": 1.5},
    {"top_p": 0.6, "min_p": 0.1},
    {"repetition_penalty": 0.8, "presence_penalty": -1.3, "frequency_penalty": 0.37, "top_p": 0.9},
    {"logit_bias": {1: 20.0, 2: -9.0, 50: 100.0}, "temperature": 0.5},
    {"min_tokens": 3, "stop_ids": frozenset({3}), "temperature": 0.3},
    {"ignore_eos": True, "min_tokens": 2, "frequency_penalty": 1.5, "temperature": 0.0},
    {"grammar": regex("[ab]{2,5}")},
    {"grammar": regex('[{]"[a-h]*": [0-9]{1,3}[}]'), "temperature": 0.0, "presence_penalty": 1.0},
    {"grammar": regex("a|bb|[0-9]+"), "min_tokens": 4, "top_p": 0.8},
]


def logits_of(ids: list[int]) -> torch.Tensor:
    """Return logits that are a function of a sequence's ids."""
    return random_logits(1, SIZE, seed=hash(tuple(ids)) % 2**31, spread=3.0)


def ends(params: SamplingParams) -> set[int]:
    return {*params.stop_ids, *(() if params.ignore_eos else (EOS,))}


def answer_of_the_sampler(row: Row) -> list[int]:
    own, ids = Sampler(frozenset({EOS}), GRAMMARS), list(row.ids)
    while len(ids) < len(PROMPT) + LONGEST:
        (token,) = own.sample(logits_of(ids), [replace(row, ids=list(ids), stop=len(ids))])
        assert isinstance(token, Token)
        ids.append(token.id)
        if token.id in ends(row.params):
            break
    return ids[len(PROMPT) :]


@dataclass
class Foreign:
    """An engine like vLLM: it keeps the rows of its batch together, and takes each row's likeliest token."""

    batch: DrawnBatch = field(
        default_factory=lambda: DrawnBatch(frozenset({EOS}), torch.device("cpu"), lambda: GRAMMARS)
    )
    running: list[Drawn] = field(default_factory=list)

    def add(self, params: SamplingParams, resumed: list[int]) -> Drawn:
        sequence = Drawn(params, len(PROMPT), [*PROMPT, *resumed], [])
        self.batch.put(len(self.running), sequence)
        self.running.append(sequence)
        return sequence

    def swap(self, one: int, other: int) -> None:
        self.batch.move(one, other, swap=True)
        self.running[one], self.running[other] = self.running[other], self.running[one]

    def step(self) -> None:
        logits = torch.cat([logits_of([*own.begun, *own.answer]) for own in self.running])
        drawn = self.batch.draw(logits).argmax(dim=1).tolist()
        for own, id in zip(self.running, drawn, strict=True):
            own.answer.append(id)  # type: ignore[attr-defined]
        for place in reversed(range(len(self.running))):
            own = self.running[place]
            if (
                own.answer[-1] in ends(own.params)
                or len(own.begun) + len(own.answer) >= len(PROMPT) + LONGEST
            ):
                self.batch.remove(place)
                last = len(self.running) - 1
                if place != last:
                    self.batch.move(last, place, swap=False)
                    self.running[place] = self.running[last]
                self.running.pop()


@given(
    picks=st.lists(
        st.tuples(st.sampled_from(PARAMS), st.integers(0, 2**64 - 1), st.integers(0, LONGEST)),
        min_size=1,
        max_size=6,
    ),
    dice=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_answers_are_those_of_the_sampler_alone_batched_and_resumed(
    picks: list[tuple[dict[str, Any], int, int]], dice: random.Random
) -> None:
    """Sequences enter at any time, some of them with a part of their answer, and change their rows."""
    rows = [row_of(PROMPT, seed=seed, **params) for params, seed, _ in picks]
    expected = [answer_of_the_sampler(row) for row in rows]
    engine, entered = Foreign(), []

    for row, answer, (_, _, kept) in zip(rows, expected, picks, strict=True):
        resumed = answer[: min(kept, len(answer) - 1)]
        entered.append((engine.add(row.params, resumed), answer))
        for _ in range(dice.randrange(3)):
            if engine.running:
                engine.swap(dice.randrange(len(engine.running)), dice.randrange(len(engine.running)))
                engine.step()
    while engine.running:
        engine.step()

    assert [[*own.begun[len(PROMPT) :], *own.answer] for own, _ in entered] == [own for _, own in entered]


def test_rows_of_others_stay_as_they_are() -> None:
    engine = Foreign()
    engine.batch.put(1, Drawn(row_of(PROMPT).params, len(PROMPT), PROMPT, []))
    logits = random_logits(3, SIZE)

    drawn = engine.batch.draw(logits.clone())

    assert torch.equal(drawn[[0, 2]], logits[[0, 2]])
    assert drawn[1].isfinite().sum() == 1


@pytest.mark.parametrize("params", [{"grammar": "{bad"}, {"logit_bias": {SIZE: 1.0}}], ids=str)
def test_a_sequence_that_cannot_be_drawn_ends_and_harms_no_other(params: dict[str, Any]) -> None:
    engine = Foreign()
    healthy = engine.add(row_of(PROMPT, seed=5).params, [])
    broken = engine.add(row_of(PROMPT, **params).params, [])

    while engine.running:
        engine.step()

    assert broken.answer == [EOS]
    assert list(healthy.answer) == answer_of_the_sampler(row_of(PROMPT, seed=5))
