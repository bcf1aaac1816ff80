"""Tokens that a draft guessed are those of plain decoding, in every bit, whatever shapes the choice."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine.drawing.verification import sample_rows
from headrace.worker.engine.interface import Fault, SamplingParams, Token
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.engine.sampling import Sampler
from headrace.worker.engine.torch_engine import TorchEngine
from headrace.worker.runner import SequenceSpec, StepReport
from tests.worker.engine.conftest import EOS, VOCABULARY
from tests.worker.engine.grammar.cases import letters, regex
from tests.worker.engine.rows import row_of

Engine = Callable[..., TorchEngine]

# Random weights repeat little. With two likely tokens, the same few follow each other often.
LIKELY = {7: 40.0, 8: 40.0}
SHAPES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.3},
    "filtered": {"temperature": 0.5, "top_k": 5, "top_p": 0.9},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.02, "frequency_penalty": 0.01},
    "bias": {"temperature": 0.0, "logit_bias": {7: 41.5, 8: 40.0, 9: 40.0}},
    "logprobs": {"temperature": 0.2, "logprobs": True, "top_logprobs": 3},
    "least": {"temperature": 0.0, "min_tokens": 30, "ignore_eos": False},
    "grammar": {
        "temperature": 0.0,
        "ignore_eos": False,
        "logit_bias": {},
        "grammar": regex("(ab|ba|12){1,40}"),
    },
    "forced": {
        "temperature": 1.0,
        "ignore_eos": False,
        "logit_bias": {},
        "grammar": regex("(abcdefgh|12345678|xyzxyz){3,12}"),
    },
}


def answers(engine: TorchEngine, params: Sequence[SamplingParams], *, speculation: bool) -> tuple[Any, int]:
    """Return all that sequences of one prompt are given, and how many tokens drafts guessed."""
    reports: queue.Queue[StepReport[int]] = queue.Queue()
    loop: EngineLoop[int] = EngineLoop(engine, step_tokens=64, prefix_cache=False, speculation=speculation)
    loop.start(reports.put)
    prompt = [3, 4, 5, 6, 3, 4, 5, 6, 3, 4]
    loop.submit(*(SequenceSpec(key, prompt, len(prompt), own) for key, own in enumerate(params)))
    given: dict[int, list[Any]] = {key: [] for key in range(len(params))}
    running, accepted = len(params), 0
    while running:
        report = reports.get(timeout=60)
        accepted += report.accepted
        for update in report.updates:
            given[update.key] += zip_longest(
                update.token_ids, update.logprobs, [(*one.ids, *one.logprobs) for one in update.top]
            )
            if update.finish is not None:
                given[update.key].append(update.finish)
                running -= 1
    loop.stop()
    return given, accepted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_answers_are_bit_identical_with_drafts(shape: str, architecture: str, tiny_engine: Engine) -> None:
    engine = tiny_engine(architecture)
    assert engine.verifies_drafts
    engine = TorchEngine(engine._forward, engine.model, letters(VOCABULARY, end=EOS))
    usual = {"max_tokens": 80, "ignore_eos": True, "logit_bias": LIKELY}
    params = [SamplingParams(seed=seed, **{**usual, **SHAPES[shape]}) for seed in (1, 2)]

    alone = [answers(engine, [own], speculation=True) for own in params]
    together, _ = answers(engine, params, speculation=True)
    plain, none = answers(engine, params, speculation=False)

    assert none == 0
    assert together == plain
    assert [given[0] for given, _ in alone] == [*plain.values()]
    assert sum(accepted for _, accepted in alone) > 5, "the answers repeat nothing, so nothing was checked"


def test_a_row_without_any_right_guess_gets_one_token() -> None:
    logits = torch.zeros(4, 16)
    logits[:, 5] = 1.0
    row = row_of([1, 2, 3], temperature=0.0)
    row.draft = (6, 5, 5)

    (token,) = sample_rows(Sampler(frozenset({0})).sample, logits, [row])

    assert isinstance(token, Token)
    assert (token.id, list(token.more)) == (5, [])


def test_a_place_that_cannot_be_sampled_ends_the_tokens_before_it() -> None:
    logits = torch.zeros(4, 16)
    logits[:, 5] = 1.0
    logits[2, 3] = float("nan")
    row = row_of([1, 2, 3], temperature=0.0)
    row.draft = (5, 5, 5)
    sample = Sampler(frozenset({0})).sample

    (token,) = sample_rows(sample, logits, [row])
    (first,) = sample_rows(sample, logits.flip(0)[[1, 0, 2, 3]], [row])

    assert isinstance(token, Token)
    assert [one.id for one in token.more] == [5]
    assert isinstance(first, Fault)


@given(
    drafts=st.lists(st.lists(st.integers(1, 3), max_size=5), min_size=1, max_size=4),
    likely=st.lists(st.integers(1, 3), min_size=24, max_size=24),
    penalty=st.sampled_from([1.0, 3.0]),
)
@settings(deadline=None)
def test_each_row_gets_the_tokens_that_sampling_one_by_one_gives(
    drafts: list[list[int]], likely: list[int], penalty: float
) -> None:
    """A penalty makes a token depend on those before it: sampling all at once would be wrong."""
    rows, lines = [], []
    for draft in drafts:
        row = row_of([1, 2, 3], temperature=0.0, repetition_penalty=penalty)
        row.draft = draft
        rows.append(row)
        lines.append(len(draft) + 1)
    logits = torch.zeros(sum(lines), 8)
    for line, token in enumerate(likely[: len(logits)]):
        logits[line, token], logits[line, 4 + token % 4] = 2.0, 1.0
    sample = Sampler(frozenset({0})).sample

    found = sample_rows(sample, logits, rows)

    begin = 0
    for row, count, result in zip(rows, lines, found, strict=True):
        ids = list(row.ids)
        expected: list[int] = []
        for place in range(count):
            again = row_of(ids, prompt=3, temperature=0.0, repetition_penalty=penalty)
            (own,) = sample(logits[begin + place : begin + place + 1], [again])
            assert isinstance(own, Token)
            expected.append(own.id)
            if place == len(row.draft) or own.id != row.draft[place]:
                break
            ids.append(own.id)
        assert isinstance(result, Token)
        assert [result.id, *(one.id for one in result.more)] == expected
        begin += count
