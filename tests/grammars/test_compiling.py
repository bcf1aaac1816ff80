"""Grammars are compiled within bounds, and the compiled ones are kept."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

import llguidance
import pytest

from headrace.grammars import compiling
from headrace.grammars.compiling import GrammarProblem, Grammars
from headrace.grammars.vocabulary import byte_vocabulary


@pytest.fixture
def grammars() -> Grammars:
    return Grammars(byte_vocabulary())


def regex(text: str) -> str:
    return str(llguidance.LLMatcher.grammar_from_regex(text))


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        ("start: /(/", "unclosed group"),
        ("start: nothing", "nothing"),
        ("{", ""),
        ("\0", ""),
        (json.dumps({"grammars": [{"json_schema": {"type": "nothing"}}]}), "type"),
        ("start: " + " ".join(f'"{number}" "a"?' for number in range(60_000)), ""),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_a_problem_of_a_few_words(
    grammar: str, problem: str, grammars: Grammars
) -> None:
    with pytest.raises(GrammarProblem) as raised:
        grammars.matcher(grammar)

    assert problem in str(raised.value)
    assert 0 < len(str(raised.value)) < 600
    assert grammar not in grammars


def test_compiled_grammars_are_kept_and_each_matcher_is_a_new_one(grammars: Grammars) -> None:
    first = grammars.matcher(regex("ab"))
    assert first.consume_tokens([97])

    assert regex("ab") in grammars
    assert grammars.kept(regex("other")) is None
    second = grammars.kept(regex("ab"))
    assert second is not None
    assert not second.is_accepting()
    assert second.consume_tokens([97, 98])


def test_those_used_last_are_kept(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MAX_KEPT", 3)
    for letter in "abcad":
        grammars.matcher(regex(letter))

    assert [regex(letter) in grammars for letter in "abcd"] == [True, False, True, True]

    monkeypatch.setattr(compiling, "MAX_KEPT_BYTES", len(regex("e")))
    grammars.matcher(regex("e"))
    assert [regex(letter) in grammars for letter in "abcde"] == [False] * 4 + [True]


@pytest.mark.parametrize("depth", [5_000, 20_000])
def test_a_long_chain_of_rules_does_not_end_the_process(depth: int, grammars: Grammars) -> None:
    """The compiler is recursive: with the stack of a usual thread, it would crash."""
    chain = "\n".join(f"r{place}: r{place + 1}" for place in range(depth))

    matcher = grammars.matcher(f'start: r0\n{chain}\nr{depth}: "x"')

    assert matcher.consume_tokens([ord("x")])
    assert matcher.is_accepting()


def test_a_limit_that_matchers_share_is_not_used_up_by_others() -> None:
    """The matchers of a compiled grammar share the states of their lexer; one compiled afresh has its own."""
    grammars = Grammars(byte_vocabulary())
    grammar = regex("[ab]*a[ab]{16}")
    dice = random.Random(1)
    first = grammars.matcher(grammar)
    while first.consume_tokens([dice.choice(b"ab")]):
        pass
    assert "too many" in first.get_error()
    assert not grammars.matcher(grammar).consume_tokens(list(b"abbaab" * 9)), "the limit is shared"

    assert grammars.matcher(grammar, afresh=True).consume_tokens(list(b"abbaab" * 9))
    assert grammars.matcher(grammar).consume_tokens(list(b"abbaab" * 9)), "the one that was kept is replaced"


def test_threads_that_start_while_grammars_are_compiled_have_stacks_of_the_usual_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The size of stacks is a setting of the whole process."""
    usual, sizes = threading.stack_size(), []
    make = llguidance.LLMatcher

    def observed(*args: Any, **named: Any) -> Any:
        with compiling._stack_lock:
            sizes.append(threading.stack_size())
        return make(*args, **named)

    grammars, grammar = Grammars(byte_vocabulary()), regex("ab")
    monkeypatch.setattr(llguidance, "LLMatcher", observed)

    grammars.matcher(grammar)

    assert sizes == [usual]
    assert threading.stack_size() == usual


def test_an_unexpected_error_of_the_compiler_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **named: Any) -> Any:
        raise RuntimeError

    grammars, grammar = Grammars(byte_vocabulary()), regex("ab")
    monkeypatch.setattr(llguidance, "LLMatcher", broken)

    with pytest.raises(GrammarProblem, match="cannot be compiled"):
        grammars.matcher(grammar)
