"""With a grammar, a row samples what it would sample if all other tokens were impossible."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.grammars.compiling import GrammarProblem
from headrace.grammars.matching import Bits, Masks, Matcher
from headrace.worker.engine.grammar.constraints import StepMasks
from headrace.worker.engine.interface import Fault, Row, Token
from headrace.worker.engine.sampling import Sampler
from tests.worker.engine.grammar.cases import letters, matches, regex
from tests.worker.engine.rows import EOS, random_logits, row_of

SIZE = 53  # not a multiple of the words of masks, nor of the vectors of kernels
GRAMMARS = letters(SIZE, end=EOS)
PATTERNS = ("[ab]{2,5}", "a|bb|[0-9]+", '[{]"[a-h]*": [0-9]{1,3}[}]', "(ab)*c?")
PROMPT = [1, 2, 3]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"top_k": 3, "temperature": 1.5},
    {"top_p": 0.6, "logprobs": True},
    {"min_p": 0.3, "top_logprobs": 4, "logprobs": True},
    {"repetition_penalty": 0.8, "presence_penalty": -1.3, "frequency_penalty": 0.37, "top_p": 0.9},
    {"logit_bias": {1: 20.0, 2: -9.0, 50: 100.0}, "temperature": 0.5},
    {"min_tokens": 3, "stop_ids": frozenset({3}), "temperature": 0.3},
]


def sampler() -> Sampler:
    return Sampler(frozenset({EOS}), GRAMMARS)


def start(pattern: str, seed: int, params: dict[str, Any]) -> Row:
    row = row_of(PROMPT, prompt=len(PROMPT), seed=seed, **params)
    return dataclasses.replace(row, params=dataclasses.replace(row.params, grammar=regex(pattern)))


def following(row: Row, id: int) -> Row:
    return dataclasses.replace(row, ids=[*row.ids, id], stop=row.stop + 1)


def logits_of(row: Row) -> torch.Tensor:
    """Return logits that are a function of the row's ids."""
    return random_logits(1, SIZE, seed=hash(tuple(row.ids)) % 2**31, spread=3.0)


def answer(row: Row, *, forgetful: bool = False) -> tuple[list[int], bool]:
    """Sample until the end, or for some steps. Returns the answer, and whether it ended."""
    own = sampler()
    found: list[int] = []
    for _ in range(12):
        if forgetful:
            row = dataclasses.replace(row, memo=type(row.memo)())
        (token,) = own.sample(logits_of(row), [row])
        assert isinstance(token, Token)
        if token.id in {EOS, *row.params.stop_ids}:
            return found, True
        found.append(token.id)
        row = following(row, token.id)
    return found, False


@given(pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 99), params=st.sampled_from(PARAMS))
@settings(max_examples=60, deadline=None)
def test_an_answer_that_ends_matches_its_grammar(pattern: str, seed: int, params: dict[str, Any]) -> None:
    row = start(pattern, seed, params)

    found, ended = answer(row)

    assert answer(row, forgetful=True) == (found, ended), "a lost matcher is rebuilt"
    if ended and not params.get("stop_ids"):
        assert matches(pattern, GRAMMARS, found)


@given(dice=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_grammar_is_applied_after_the_other_edits_and_before_the_filters(dice: random.Random) -> None:
    """As if the others had logits of -inf. Rows without a grammar, or with another one, change nothing."""
    rows: list[Row] = []
    for seed in range(6):
        row = start(dice.choice(PATTERNS), seed, dice.choice(PARAMS))
        for _ in range(dice.randrange(4)):
            (token,) = sampler().sample(logits_of(row), [row])
            assert isinstance(token, Token)
            if token.id in {EOS, *row.params.stop_ids}:
                break
            row = following(row, token.id)
        rows.append(row if dice.random() < 0.7 else plain(row))
    logits = torch.cat([logits_of(row) for row in rows])

    found = sampler().sample(logits, rows)

    for index, row in enumerate(rows):
        own = logits[index : index + 1]
        assert found[index] == sampler().sample(own, [row])[0]
        if row.params.grammar:
            token = found[index]
            assert isinstance(token, Token)
            assert token.id == by_hand(own, row)
            if row.params.logprobs:
                assert token.logprob == pytest.approx(own.log_softmax(-1)[0, token.id].item(), abs=1e-5)
                assert token.top == likeliest(own, row)
        else:
            assert found[index] == Sampler(frozenset({EOS})).sample(own, [row])[0]


@given(dice=st.randoms(use_true_random=False), spread=st.sampled_from([0.1, 3.0]))
@settings(max_examples=60, deadline=None)
def test_a_likely_token_is_sampled_without_a_mask_as_with_one(dice: random.Random, spread: float) -> None:
    rows, logits = [], []
    for seed in range(6):
        row = start(dice.choice(PATTERNS), seed, dice.choice(PARAMS))
        own = random_logits(1, SIZE, seed=dice.randrange(999), spread=spread)
        likely = np.flatnonzero(allowed_by(row)).tolist()
        own[0, dice.sample(likely, min(2, len(likely)))] += dice.choice([2.0, 4.0, 9.0])
        if dice.random() < 0.1:
            own[0, dice.randrange(SIZE)] = float("nan")
        rows.append(row)
        logits.append(own)

    found = sampler().sample(torch.cat(logits), rows)

    for row, own, token in zip(rows, logits, found, strict=True):
        finite = bool(own.isfinite().all())
        assert token == sampler().sample(own, [dataclasses.replace(row, memo=type(row.memo)())])[0]
        if finite:
            assert isinstance(token, Token)
            assert token.id == by_hand(own, row)


@pytest.mark.parametrize(
    ("likely", "params", "masks"),
    [
        (1, {}, 0),
        (1, {"temperature": 0.0, "top_k": 3}, 0),
        (20, {}, 1),  # not allowed
        (1, {"top_p": 0.9}, 1),  # the filter would count tokens that are not allowed
    ],
)
def test_a_mask_is_computed_if_the_token_may_differ_without(
    monkeypatch: pytest.MonkeyPatch, likely: int, params: dict[str, Any], masks: int
) -> None:
    own, row, computed = sampler(), start("[ab]{2,5}", 1, params), 0
    logits = torch.zeros(1, SIZE)
    logits[0, likely] = 50
    expected = by_hand(logits, row)
    fill = Masks.fill

    def counted(own: Masks, matchers: Mapping[int, Matcher], bits: Bits) -> dict[int, GrammarProblem]:
        nonlocal computed
        computed += len(matchers)
        return fill(own, matchers, bits)

    monkeypatch.setattr(Masks, "fill", counted)
    (token,) = own.sample(logits, [row])

    assert isinstance(token, Token)
    assert token.id == expected
    assert computed == masks


@pytest.mark.parametrize("seed", range(20))
def test_min_p_is_relative_to_the_likeliest_token_that_is_allowed(seed: int) -> None:
    """Though a likelier one, which is not allowed, might be sampled too."""
    row, logits = start("[ab]{2,5}", seed, {"min_p": 0.9}), torch.zeros(1, SIZE)
    logits[0, [20, 1, 2]] = torch.tensor([5.0, 4.95, 4.89])  # 0.9 is a difference of 0.105

    (token,) = sampler().sample(logits, [row])

    assert isinstance(token, Token)
    assert token.id == by_hand(logits, row)


def test_an_answer_ends_early_where_all_that_is_allowed_would_end_it() -> None:
    row = start("[cd]e", 1, {"min_tokens": 9, "stop_ids": frozenset({3, 4})})

    (token,) = sampler().sample(random_logits(1, SIZE, seed=1), [row])

    assert isinstance(token, Token)
    assert token.id in {3, 4}


def plain(row: Row) -> Row:
    return dataclasses.replace(row, params=dataclasses.replace(row.params, grammar=""))


def likeliest(logits: torch.Tensor, row: Row) -> object:
    """Return the most likely tokens, which a grammar does not change."""
    (token,) = Sampler(frozenset({EOS})).sample(logits, [plain(row)])
    assert isinstance(token, Token)
    return token.top


def allowed_by(row: Row) -> npt.NDArray[np.bool]:
    """Return whether the grammar of a row allows each token."""
    return _allowed(sampler()._constraints.compute([row], [0]))


def _allowed(masks: StepMasks) -> npt.NDArray[np.bool]:
    bits = np.unpackbits(masks.bits[0].view(np.uint8), bitorder="little")
    return np.asarray(bits[:SIZE] == 1)


def by_hand(logits: torch.Tensor, row: Row) -> int:
    """Return the token of a row whose edits are applied first, and then its grammar as logits of -inf."""
    own = sampler()
    masks = own._constraints.compute([row], [0])
    edited, faults = own._edit(logits, [row], masks.lifted)
    assert not faults
    masked = torch.where(torch.from_numpy(_allowed(masks)), edited, float("-inf"))
    filters = ("temperature", "top_k", "top_p", "min_p", "seed")
    kept = {name: getattr(row.params, name) for name in filters}
    (token,) = own.sample(masked, [row_of(row.ids, prompt=row.prompt, **kept)])
    assert isinstance(token, Token)
    return token.id


def test_where_the_grammar_allows_only_the_end_the_answer_ends_whatever_min_tokens_is() -> None:
    row = start("a", 1, {"min_tokens": 9, "temperature": 0.0})

    assert answer(row) == ([1], True)
    longer, ended = answer(start("a{1,4}", 1, {"min_tokens": 3, "temperature": 0.0}))
    assert (len(longer) >= 3, ended) == (True, True)


def test_a_row_that_cannot_follow_its_grammar_fails_alone() -> None:
    good, other = start("[ab]+", 1, {}), plain(start("a", 2, {}))
    bad = [
        following(start("[ab]+", 1, {}), 20),  # resumed with what the grammar does not allow
        dataclasses.replace(
            good, params=dataclasses.replace(good.params, grammar="start: /(/"), memo=type(good.memo)()
        ),
    ]
    logits = random_logits(4, SIZE, seed=1)

    results = sampler().sample(logits, [good, *bad, other])

    for result in results[1:3]:
        assert isinstance(result, Fault)
        assert result.invalid
    assert results[0] == sampler().sample(logits[:1], [good])[0]
    assert results[3] == sampler().sample(logits[3:], [other])[0]


def test_an_engine_without_grammars_rejects_them() -> None:
    results = Sampler(frozenset({EOS})).sample(random_logits(2, SIZE, seed=1), [start("a", 1, {}), row_of()])

    assert isinstance(results[0], Fault)
    assert isinstance(results[1], Token)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_noticed_behind_a_mask(value: float, temperature: float) -> None:
    logits = random_logits(1, SIZE, seed=1)
    logits[0, 40] = value

    (result,) = sampler().sample(logits, [start("a|b", 1, {"temperature": temperature})])

    assert isinstance(result, Fault)


def test_a_limit_that_other_answers_have_used_up_does_not_fail_a_row() -> None:
    row, own = start("[ab]{1,3}", 1, {}), sampler()
    spent = own._constraints._grammars
    assert spent is not None
    matcher = spent.matcher(row.params.grammar)
    (expected,) = own.sample(logits_of(row), [row])
    row.memo.matcher.inner.consume_token(9)  # an error state, as if a shared limit was exceeded
    assert row.memo.matcher.inner.is_error()
    assert not matcher.is_error()

    assert own.sample(logits_of(row), [row]) == [expected]


def test_a_row_is_compiled_for_once_at_most_when_it_exceeds_a_limit() -> None:
    """A step waits for that; an engine that runs ahead launches one more step of a row that has failed."""
    own, row = sampler(), start("[ab]{1,3}", 1, {})
    grammars = own._constraints._grammars
    assert grammars is not None
    row.memo.matcher = Matcher(grammars.matcher(row.params.grammar))
    row = following(row, 20)  # not allowed
    compiled: list[bool] = []
    make = grammars.matcher

    def counted(grammar: str, *, afresh: bool = False) -> Any:
        compiled.append(afresh)
        return make(grammar, afresh=afresh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammars, "matcher", counted)
        for _ in range(3):
            (result,) = own.sample(logits_of(row), [row])
            assert isinstance(result, Fault)
            row = following(row, 1)

    assert compiled == [True]
