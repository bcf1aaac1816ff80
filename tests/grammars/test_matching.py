"""The masks of a matcher are those of the language, and functions of the grammar and the ids."""

from __future__ import annotations

import json
import random

import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.grammars import matching
from headrace.grammars.compiling import GrammarProblem, Grammars
from headrace.grammars.matching import Masks, Matcher, follow
from headrace.grammars.vocabulary import Vocabulary, byte_vocabulary

END = 0
LETTERS = "ab{"
# All letters, longer tokens, one that occurs twice, a special one, and an id that the model does not use.
TOKENS = [b"</s>", b"a", b"b", b"{", b"ab", b"ba", b"{a", b"aab", b"ab", b"", b""]
SPECIAL = 9
WORDS = st.text(LETTERS, min_size=0, max_size=6)


def vocabulary() -> Vocabulary:
    def encode(text: str) -> list[int]:
        return [1 + LETTERS.index(letter) for letter in text]

    return Vocabulary(TOKENS, specials={"</s>": END, "<x>": SPECIAL}, eos_ids=[END], encode=encode)


GRAMMARS = Grammars(vocabulary())
MASKS = Masks(GRAMMARS.vocabulary, threads=1)


def choices(words: list[str]) -> str:
    return str(llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, words))))


def allowed(matcher: Matcher, masks: Masks = MASKS) -> set[int]:
    bits = np.full((3, masks.words + 2), -1, np.int32)
    assert masks.fill({1: matcher}, bits) == {}
    assert (bits[[0, 2]] == -1).all(), "other rows are not written"
    return set(np.flatnonzero(np.unpackbits(bits[1, : masks.words].view(np.uint8), bitorder="little")))


@given(words=st.lists(WORDS, min_size=1, max_size=5, unique=True), dice=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_mask_is_that_of_the_language(words: list[str], dice: object) -> None:
    """Brute force over the vocabulary. Where the next bytes are forced, one of the right tokens remains."""
    matcher, text = follow(GRAMMARS, choices(words), ()), b""
    while True:
        rest = [word.encode()[len(text) :] for word in words if word.encode().startswith(text)]
        right = {
            id
            for id, token in enumerate(TOKENS)
            if id and token and any(own.startswith(token) for own in rest)
        }
        ends = {END} if b"" in rest else set()
        found = allowed(matcher)

        if not matcher.forced:
            assert found == {id for id in range(len(TOKENS)) if matcher.allows(id)}
        forced = not ends and len({own[0] for own in rest}) == 1
        assert found == right | ends or (forced and len(found) == 1 and found <= right)
        assert SPECIAL not in found
        if not right:
            return
        token = dice.choice(sorted(found - ends) or sorted(right))  # type: ignore[attr-defined]
        matcher.advance([token])
        text += TOKENS[token]


@given(words=st.lists(WORDS.filter(bool), min_size=1, max_size=5), split=st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_a_matcher_is_a_function_of_the_ids(words: list[str], split: int) -> None:
    ids = [1 + LETTERS.index(letter) for letter in words[0]]
    grown, grammar = follow(GRAMMARS, choices(words), ()), choices(words)
    for id in ids:
        allowed(grown)
        grown.advance([id])
    resumed = follow(GRAMMARS, grammar, ids[:split])
    resumed.advance(ids[split:])

    assert grown.consumed == resumed.consumed == len(ids)
    assert allowed(grown) == allowed(resumed) == allowed(follow(GRAMMARS, grammar, ids))


def test_ids_that_the_grammar_does_not_allow_are_a_problem() -> None:
    with pytest.raises(GrammarProblem, match="satisfy the grammar"):
        follow(GRAMMARS, choices(["ab"]), [2])


def test_an_answer_is_followed_though_others_have_used_up_a_limit() -> None:
    """As when an answer resumes on a worker that has seen many answers of its grammar."""
    grammars, grammar = (
        Grammars(byte_vocabulary()),
        str(llguidance.LLMatcher.grammar_from_regex("[ab]*a[ab]{16}")),
    )
    first, dice = follow(grammars, grammar, ()), random.Random(1)
    with pytest.raises(GrammarProblem, match="too many"):
        while True:
            first.advance([dice.choice(b"ab")])
    answer = b"abbaab" * 9

    assert follow(grammars, grammar, answer).consumed == len(answer)
    with pytest.raises(GrammarProblem, match="satisfy the grammar"):
        follow(grammars, grammar, [*answer, ord("c")])


def test_a_matcher_that_exceeds_a_limit_does_not_affect_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_FEWEST_PARALLEL", 2)
    for masks in (MASKS, Masks(GRAMMARS.vocabulary, threads=4)):
        good, bad, other = (follow(GRAMMARS, choices(["ab", "b"]), ()) for _ in range(3))
        bad.inner.consume_token(3)  # puts it into an error state, as a limit does
        bits = np.empty((4, masks.words), np.int32)

        problems = masks.fill({0: good, 1: bad, 3: other}, bits)

        assert list(problems) == [1]
        assert bits[0].tolist() == bits[3].tolist()
        assert allowed(good) == {1, 2, 4, 8}


def test_all_ends_of_a_model_are_allowed_where_the_grammar_may_end() -> None:
    tokens = [b"a", b"", b"", b"<end>"]
    two = Vocabulary(tokens, specials={"<end>": 3, "<more>": 1}, eos_ids=[3, 1], encode=lambda text: [0])
    grammars, masks = Grammars(two), Masks(two, threads=1)
    grammar = llguidance.LLMatcher.grammar_from_regex("aa?")

    assert [allowed(follow(grammars, grammar, [0] * n), masks) for n in range(3)] == [{0}, {0, 1, 3}, {1, 3}]


def test_special_tokens_are_allowed_by_name_only() -> None:
    grammars = Grammars(byte_vocabulary())
    masks = Masks(grammars.vocabulary, threads=1)

    assert allowed(follow(grammars, 'start: /[a-z]/ | <|fault|> "x"', ()), masks) == {*range(97, 123), 257}
    everything = allowed(follow(grammars, "start: /(.|\\n)*/", ()), masks)
    assert {257} & everything == set()
    assert {256, *range(0x20, 0x7F)} <= everything
