"""The echo engine's answers with a grammar: deterministic, short, and always of the right form."""

from __future__ import annotations

import queue
import re
import time
from collections.abc import Callable, Sequence
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.interface import Engine
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.runner import FinishReason, SamplingParams, SequenceSpec, StepReport
from tests.worker.engine.grammar.cases import PERSON, is_person, regex
from tests.worker.engine.plan.device import DeviceEngine


def _matches(pattern: re.Pattern[bytes], text: bytes) -> bool:
    return pattern.fullmatch(text) is not None


FORMS: dict[str, Callable[[bytes], bool]] = {
    PERSON: is_person,
    **{
        regex(pattern): partial(_matches, re.compile(pattern.encode()))
        for pattern in ("[a-z]+( [a-z]+)*", "[ab]*c[0-9]{3}", "yes|no", "-?[0-9]+")
    },
}
TEXTS = st.binary(min_size=1, max_size=30)


def run(
    engine: Engine, specs: Sequence[SequenceSpec[int]], *, step_tokens: int = 512
) -> list[tuple[bytes, str]]:
    """Return the answer of each sequence, resumed tokens included, and how it ended."""
    loop: EngineLoop[int] = EngineLoop(engine, step_tokens=step_tokens)
    reports: queue.SimpleQueue[StepReport[int]] = queue.SimpleQueue()
    loop.start(reports.put)
    loop.submit(*specs)
    answers = [[*spec.ids[spec.prompt :]] for spec in specs]
    ends = [""] * len(specs)
    while not all(ends):
        for update in reports.get(timeout=60).updates:
            answers[update.key] += update.token_ids
            if update.finish is not None:
                ends[update.key] = update.finish.value
    loop.stop()
    return [(bytes(answer), end) for answer, end in zip(answers, ends, strict=True)]


def spec(
    key: int, text: bytes, grammar: str, *, resumed: bytes = b"", most: int = 300, least: int = 0
) -> SequenceSpec[int]:
    params = SamplingParams(seed=key, max_tokens=most, min_tokens=least, grammar=grammar)
    return SequenceSpec(key, [*text, *resumed], len(text), params, submitted=time.monotonic())


@given(texts=st.lists(TEXTS, min_size=1, max_size=4), grammar=st.sampled_from([*FORMS]))
@settings(max_examples=30, deadline=None)
def test_answers_have_the_right_form_and_end(texts: list[bytes], grammar: str) -> None:
    found = run(EchoEngine(), [spec(key, text, grammar) for key, text in enumerate(texts)])

    for text, (answer, end) in zip(texts, found, strict=True):
        assert end == "stop"
        assert FORMS[grammar](answer)
        assert len(answer) < len(text) + 100


@pytest.mark.parametrize("grammar", FORMS)
def test_an_answer_is_the_same_in_a_batch_after_preemption_ahead_and_resumed(grammar: str) -> None:
    texts = [b"bob is 42, and abc", b"no 12 yes", b"c" * 40, b"{}"]
    specs = [spec(key, text, grammar) for key, text in enumerate(texts)]
    alone = [run(EchoEngine(), [spec(0, text, grammar)])[0] for text in texts]
    # 16 blocks of 8 tokens are too few for all of them, so some are preempted.
    small = EchoEngine(context_length=128, block_tokens=8, kv_blocks=16)

    assert run(EchoEngine(), specs) == alone
    assert run(small, [spec(key, text, grammar, most=80) for key, text in enumerate(texts)]) == alone
    assert run(DeviceEngine(EchoEngine()), specs) == alone
    for text, (answer, end) in zip(texts, alone, strict=True):
        resumed = [spec(key, text, grammar, resumed=answer[:key]) for key in range(len(answer))]
        assert run(EchoEngine(), resumed) == [(answer, end)] * len(answer)


def test_the_prompt_is_repeated_where_the_grammar_allows_it() -> None:
    words = regex("[a-z]+( [a-z]+)*")
    quoted = regex('"[^"]*"')

    assert run(EchoEngine(), [spec(0, b"the same words", words)]) == [(b"the same words", "stop")]
    assert run(EchoEngine(), [spec(0, b"a text", quoted)]) == [(b'" text"', "stop")]


def test_min_tokens_delays_the_end_if_the_grammar_allows_more() -> None:
    found = run(
        EchoEngine(), [spec(0, b"ab", regex("[a-z]*"), least=9), spec(1, b"ab", regex("ab"), least=9)]
    )

    assert [(len(answer), end) for answer, end in found] == [(9, "stop"), (2, "stop")]


def test_a_sequence_that_exceeds_a_limit_fails_alone() -> None:
    """The number of items of a row grows with the answer: each 'a' can be derived in many ways."""
    ambiguous = 'start: s\ns: s s s | "a" s | "b" s | "a" | ""'
    specs = [spec(0, b"a" * 400, ambiguous, most=390), spec(1, b"a" * 50, regex("a+")), spec(2, b"plain", "")]

    found = run(EchoEngine(), specs)

    assert found[0][1] == FinishReason.INVALID.value
    assert found[1:] == [(b"a" * 50, "stop"), (b"plain", "stop")]
