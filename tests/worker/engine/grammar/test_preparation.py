"""A grammar that is being compiled delays its own sequence, and nothing else."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from headrace.deadline import NEVER, Deadline
from headrace.grammars.compiling import GrammarProblem, Grammars
from headrace.grammars.vocabulary import byte_vocabulary
from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.plan.loop import EngineLoop
from headrace.worker.runner import FinishReason, SamplingParams, SequenceSpec, StepReport
from tests.worker.engine.grammar.cases import PERSON, regex

SECONDS = 90  # longer than a step takes on any machine
WORD = regex("[a-z]+")


class GatedGrammars(Grammars):
    """Compiles a grammar only when the test permits it."""

    def __init__(self) -> None:
        super().__init__(byte_vocabulary())
        self.entered: queue.Queue[str] = queue.Queue()
        self.permits: queue.Queue[Exception | None] = queue.Queue()

    def matcher(self, grammar: str, *, afresh: bool = False) -> object:  # type: ignore[override]
        self.entered.put(grammar)
        error = self.permits.get(timeout=SECONDS)
        if error is not None:
            raise error
        return super().matcher(grammar, afresh=afresh)


@dataclass
class Ended:
    """The sequences of a loop that have ended: their answers, reasons and messages by key."""

    loop: EngineLoop[int]
    grammars: GatedGrammars
    reports: queue.Queue[StepReport[int]]
    answers: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, tuple[FinishReason, str]] = field(default_factory=dict)

    def wait(self, *keys: int) -> None:
        """Wait until the sequences have ended."""
        while not self.ends.keys() >= {*keys}:
            self.add(self.reports.get(timeout=SECONDS))

    def add(self, report: StepReport[int]) -> None:
        for update in report.updates:
            assert update.key not in self.ends
            self.answers.setdefault(update.key, []).extend(update.token_ids)
            if update.finish is not None:
                self.ends[update.key] = update.finish, update.fault


@contextmanager
def running() -> Iterator[Ended]:
    engine = EchoEngine(max_running=4)
    engine.grammars = grammars = GatedGrammars()
    reports: queue.Queue[StepReport[int]] = queue.Queue()
    loop: EngineLoop[int] = EngineLoop(engine)
    loop.start(reports.put)
    try:
        yield Ended(loop, grammars, reports)
    finally:
        for _ in range(20):
            grammars.permits.put(None)
        loop.stop()


def sequence(
    key: int,
    text: bytes = b"hello",
    *,
    grammar: str = WORD,
    resumed: bytes = b"",
    deadline: Deadline = NEVER,
) -> SequenceSpec[int]:
    params = SamplingParams(seed=0, max_tokens=50, grammar=grammar)
    return SequenceSpec(key, [*text, *resumed], len(text), params, deadline, time.monotonic())


def test_other_sequences_are_computed_while_a_grammar_is_compiled() -> None:
    with running() as run:
        run.loop.submit(sequence(1))
        assert run.grammars.entered.get(timeout=SECONDS) == WORD
        run.loop.submit(sequence(2, grammar=""))
        run.wait(2)
        assert 1 not in run.ends

        run.grammars.permits.put(None)  # the loop sleeps, and must wake up
        run.wait(1)

    assert (bytes(run.answers[1]), run.ends[1]) == (b"hello", (FinishReason.STOP, ""))


def test_a_grammar_that_was_compiled_before_delays_nothing() -> None:
    with running() as run:
        run.grammars.permits.put(None)
        run.loop.submit(sequence(1))
        run.wait(1)
        run.loop.submit(sequence(2), sequence(3))
        run.wait(2, 3)

        assert run.grammars.entered.qsize() == 1


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_sequence_is_cancelled_while_its_grammar_is_compiled(late: bool) -> None:
    with running() as run:
        run.loop.submit(sequence(1))
        run.grammars.entered.get(timeout=SECONDS)
        run.loop.cancel(1)
        run.wait(1)
        assert run.ends[1] == (FinishReason.CANCELLED, "")
        if late:
            run.grammars.permits.put(None)
        run.ends.clear()
        run.loop.submit(sequence(1, b"again", grammar=""))
        run.wait(1)

    assert bytes(run.answers[1]) == b"again", "what was compiled is not used for a later sequence of that key"


def test_a_deadline_passes_while_a_grammar_is_compiled() -> None:
    """The engine is idle, so nothing else wakes it."""
    with running() as run:
        run.loop.submit(sequence(1, deadline=Deadline.after(0.05, time.monotonic())))
        run.wait(1)

    assert run.ends[1] == (FinishReason.DEADLINE, "")


def test_stopping_ends_sequences_whose_grammars_are_compiled() -> None:
    with running() as run:
        run.loop.submit(sequence(1), sequence(2, grammar=PERSON), sequence(3, grammar=regex("x")))
        run.grammars.entered.get(timeout=SECONDS)
        run.loop.stop()
        run.wait(1, 2, 3)

    assert {reason for reason, _ in run.ends.values()} == {FinishReason.CANCELLED}


@pytest.mark.parametrize(
    ("error", "reason", "words"),
    [
        (GrammarProblem("it is too large"), FinishReason.INVALID, "it is too large"),
        (RuntimeError("unexpected"), FinishReason.FAULT, "worker's log"),
    ],
    ids=["invalid", "unexpected"],
)
def test_a_grammar_that_cannot_be_compiled_ends_its_sequence_only(
    error: Exception, reason: FinishReason, words: str
) -> None:
    with running() as run:
        run.loop.submit(sequence(1), sequence(2, grammar=""))
        run.grammars.permits.put(error)
        run.wait(1, 2)
        run.grammars.permits.put(None)
        run.loop.submit(sequence(3))
        run.wait(3)

    assert run.ends[1][0] is reason
    assert words in run.ends[1][1]
    assert {run.ends[key] for key in (2, 3)} == {(FinishReason.STOP, "")}


def test_resumed_tokens_that_the_grammar_does_not_allow_are_the_callers_fault() -> None:
    with running() as run:
        run.grammars.permits.put(None)
        run.loop.submit(sequence(1, resumed=b"12"))
        run.wait(1)

    assert run.ends[1][0] is FinishReason.INVALID
    assert "satisfy the grammar" in run.ends[1][1]


def test_a_key_in_use_is_rejected_while_its_grammar_is_compiled() -> None:
    with running() as run:
        run.loop.submit(sequence(1))
        run.grammars.entered.get(timeout=SECONDS)
        run.loop.submit(sequence(1, grammar=""))
        run.wait(1)

    assert run.ends[1][0] is FinishReason.FAULT
    assert "in use" in run.ends[1][1]


def test_sequences_that_wait_for_grammars_are_reported_as_waiting() -> None:
    with running() as run:
        run.loop.submit(sequence(1, b"12345"))
        run.grammars.entered.get(timeout=SECONDS)
        run.loop.submit(sequence(2, grammar=""))
        report = run.reports.get(timeout=SECONDS)

        assert (report.waiting, report.uncomputed_prompt_tokens) == (1, 5)
        assert report.oldest_wait > 0


def test_any_thread_may_submit() -> None:
    count = 40
    grammars = [WORD, PERSON, "", regex("[0-9]{3}")]
    with running() as run:
        for _ in range(4 * count):
            run.grammars.permits.put(None)

        def submit(keys: Sequence[int]) -> None:
            for key in keys:
                run.loop.submit(sequence(key, b"some text 12", grammar=grammars[key % 4]))

        threads = [threading.Thread(target=submit, args=[range(first, count, 3)]) for first in range(3)]
        for thread in threads:
            thread.start()
        run.wait(*range(count))
        for thread in threads:
            thread.join()

    assert {run.ends[key] for key in range(count)} == {(FinishReason.STOP, "")}
    for key in range(count):
        same = [bytes(run.answers[other]) for other in range(key % 4, count, 4)]
        assert len({*same}) == 1


def test_a_sequence_that_is_submitted_after_the_end_is_ignored() -> None:
    """As is one without a grammar: nothing computes any more."""
    with running() as run:
        run.loop.stop()

        run.loop.submit(sequence(1), sequence(2, grammar=""))

        assert run.reports.empty()
