"""Drafts change no answer and no accounting, and are made only where they pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine.echo import EchoEngine
from headrace.worker.engine.interface import Fault, Result, Row, Token
from headrace.worker.engine.plan.speculation import (
    MOST_DRAFTED,
    MOST_ROWS,
    Candidate,
    Chances,
    Speculation,
    SpeculativeSequence,
    StepTimes,
    paying,
)
from headrace.worker.runner import FinishReason, SamplingParams, SequenceSpec
from tests.worker.engine.plan.device import hashed
from tests.worker.engine.plan.scheduling import Arrival, Run, sequence
from tests.worker.engine.plan.test_scheduler import ARRIVALS

PERIOD = [5, 6, 7, 8]


class VerifyingEngine(EchoEngine):
    """Answers that often repeat themselves, from an engine that verifies drafts and checks its blocks.

    faulty   whether each twentieth token cannot be sampled
    """

    faulty = False

    def step(self, rows: Sequence[Row]) -> list[Result]:
        whole = [
            replace(row, stop=row.stop + len(row.draft), ids=[*row.ids, *row.draft], draft=()) for row in rows
        ]
        return [
            self._verified(row) if isinstance(result, Token) else result
            for row, result in zip(rows, super().step(whole), strict=True)
        ]

    def _verified(self, row: Row) -> Token | Fault:
        ids = list(row.ids[: row.stop])
        first = self._next(row, ids)
        last, more = first, []
        for guess in row.draft:
            if not isinstance(last, Token) or last.id != guess:
                break
            ids.append(guess)
            last = self._next(row, ids)
            if isinstance(last, Token):
                more.append(last)
        if isinstance(first, Token):
            first.more = more
        return first

    def _next(self, row: Row, ids: list[int]) -> Token | Fault:
        answered = len(ids) - row.prompt
        if self.faulty and answered % 20 == 19:
            return Fault("on purpose")
        if answered % 9:
            return Token(PERIOD[answered % len(PERIOD)])
        return Token(hashed(ids, may_end=not row.params.ignore_eos))


@given(
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=8),
    max_running=st.integers(1, 4),
    block_tokens=st.integers(1, 6),
    spare_blocks=st.integers(0, 10),
    prefix_cache=st.booleans(),
    faulty=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_random_traffic_gets_the_same_answers_with_drafts(
    arrivals: list[Arrival],
    max_running: int,
    block_tokens: int,
    spare_blocks: int,
    prefix_cache: bool,
    faulty: bool,
) -> None:
    """Also with cancellations, deadlines and KV memory for little more than one sequence."""
    context = 96
    arrivals = [replace(one, max_tokens=3 * one.max_tokens) for one in arrivals]
    runs = []
    for speculation in (None, Speculation()):
        engine = VerifyingEngine(
            max_running=max_running,
            context_length=context,
            block_tokens=block_tokens,
            kv_blocks=-(-context // block_tokens) + spare_blocks,
        )
        engine.faulty = faulty
        run = Run(engine, 24, prefix_cache, speculation)
        run.arrive(arrivals)
        run.finish(within=5000)
        runs.append(run)

    plain, speculative = runs
    assert set(plain.endings) == set(speculative.endings) == set(range(len(arrivals)))
    early = (FinishReason.CANCELLED, FinishReason.DEADLINE)
    for key in plain.endings:
        answers = plain.answers[key], speculative.answers[key]
        if plain.endings[key] in early or speculative.endings[key] in early:
            shorter = min(map(len, answers))
            assert answers[0][:shorter] == answers[1][:shorter]
        else:
            assert answers[0] == answers[1]
            assert plain.endings[key] is speculative.endings[key]


def test_an_answer_that_repeats_itself_takes_fewer_steps() -> None:
    steps = []
    for speculation in (None, Speculation()):
        run = Run(VerifyingEngine(), 24, True, speculation)
        run.add(sequence(0, Arrival(shared=0, own=4, max_tokens=60)))
        run.finish(within=100)
        steps.append(run.steps)
        assert len(run.answers[0]) == 60

    assert steps[0] == 60
    assert steps[1] < 50


def test_no_step_has_more_drafts_than_its_bound_and_large_ones_have_none() -> None:
    for rows in (1, MOST_ROWS, MOST_ROWS + 1):
        run = Run(VerifyingEngine(max_running=rows), 24, True, Speculation())
        for key in range(rows):
            run.add(sequence(key, Arrival(shared=0, own=4, max_tokens=60)))
        drafted = []
        while not run.scheduler.idle:
            drafted.append(sum(len(row.draft) for row in run.step()))
        assert max(drafted) <= MOST_DRAFTED
        assert any(drafted) == (rows <= MOST_ROWS)


def test_drafts_pay_only_as_long_as_a_step_gains_more_than_it_loses() -> None:
    gains = [(0.9**i, 0) for i in range(1, 16)]

    assert paying(gains, 1, lambda tokens: 1.0) == 15  # more tokens take no time
    assert paying(gains, 1, float) == 0  # a token in a step takes as long as a step
    some = paying(gains, 1, lambda tokens: 1 + 0.2 * tokens)
    assert 0 < some < 15
    assert paying(gains, 8, lambda tokens: 1 + 0.2 * tokens) < some
    assert paying([(0.01, 0)], 1, lambda tokens: 1.0) == 0  # too little to be certain of


def test_the_time_of_a_step_is_learnt_from_steps_of_several_sizes() -> None:
    times = StepTimes()
    assert times.estimate(5) == 0
    for _ in range(200):
        for tokens in (1, 4, 9):
            times.record(tokens, 0.01 + 0.002 * tokens)

    for tokens in (1, 4, 9, 12):
        assert abs(times.estimate(tokens) / (0.01 + 0.002 * tokens) - 1) < 0.1
    times.record(4, 100.0)  # one interrupted step changes little
    assert times.estimate(4) < 0.03


def test_drafts_that_are_always_wrong_stop_and_are_tried_again_later() -> None:
    speculation, own = Speculation(), SpeculativeSequence()
    for tokens in range(1, 10):
        speculation.times.record(tokens, 0.01 + 0.0005 * tokens)
    ids = PERIOD * 3
    drafted = []
    for _ in range(600):
        (draft,) = speculation.drafts([Candidate(own, ids, 100)])
        drafted.append(len(draft))
        speculation.record(own, 0)

    assert drafted[0] > 3
    assert sum(map(bool, drafted[50:])) < 0.05 * 550
    assert any(drafted[50:])


def test_answers_of_a_scope_are_drafted_again_in_it_and_in_no_other() -> None:
    speculation = Speculation()
    speculation.remember(b"ours", [1, 2, 3, 4, 5, 6, 7, 8])

    for scope, expected in ((b"ours", [5, 6, 7, 8]), (b"theirs", [])):
        assert speculation.drafts([Candidate(SpeculativeSequence(scope), [9, 2, 3, 4], 100)]) == [expected]


def test_a_longer_match_in_the_sequence_itself_goes_before_another_answer() -> None:
    speculation = Speculation()
    speculation.remember(b"", [7, 8, 1, 2, 3, 4])

    (draft,) = speculation.drafts([Candidate(SpeculativeSequence(), PERIOD * 3, 100)])

    assert draft == (PERIOD * 4)[: len(draft)]
    assert len(draft) > 3


def test_an_answer_like_an_earlier_one_takes_fewer_steps() -> None:
    """The scheduler keeps each answer when it ends."""
    arrival, steps = Arrival(shared=30, own=0, max_tokens=30), []
    run = Run(VerifyingEngine(), 24, True, Speculation())
    for key in range(2):
        run.add(sequence(key, arrival))
        before = run.steps
        run.finish(within=100)
        steps.append(run.steps - before)

    assert run.answers[0] == run.answers[1]
    assert steps[1] < steps[0]


def test_chances_tell_the_first_tokens_of_a_draft_from_the_later_ones() -> None:
    chances = Chances()
    for _ in range(100):
        chances.record(1, 16, 3)  # the fourth token is wrong

    alone, few = chances.of(0, 0.5), chances.of(1, 0.5)

    assert alone > 0.9
    assert 0.5 < few < alone
    assert chances.of(2, 0.5) == 0.5  # never tried


def test_a_sequence_that_ends_soon_gets_no_longer_draft_than_it_needs() -> None:
    speculation, own = Speculation(), SpeculativeSequence()

    assert [len(draft) for draft in speculation.drafts([Candidate(own, PERIOD * 3, 2)])] == [2]
    assert speculation.drafts([Candidate(own, PERIOD * 3, 0)]) == [[]]


def test_what_a_grammar_forces_is_drafted_even_if_nothing_repeats() -> None:
    speculation, own = Speculation(), SpeculativeSequence()

    assert speculation.drafts([Candidate(own, [1, 2, 3, 4], 9, [7, 8, 9])]) == [[7, 8, 9]]
    speculation.record(own, 3)
    assert speculation.drafts([Candidate(own, [1, 2, 3, 4], 9)]) == [[]]


def test_a_match_continues_what_a_grammar_forces_only_if_they_agree() -> None:
    candidates = [Candidate(SpeculativeSequence(), PERIOD * 3, 8, forced) for forced in ([5, 6], [5, 9])]

    agreeing, other = (Speculation().drafts([candidate])[0] for candidate in candidates)

    assert len(agreeing) > 2
    assert agreeing == (PERIOD * 2)[: len(agreeing)]
    assert other == [5, 9]


def test_wrong_guesses_after_forced_ids_do_not_stop_the_forced_ones() -> None:
    speculation, own = Speculation(), SpeculativeSequence()
    for tokens in range(1, 10):
        speculation.times.record(tokens, 0.01 + 0.0005 * tokens)
    for _ in range(100):
        (draft,) = speculation.drafts([Candidate(own, PERIOD * 3, 100, [5, 6])])
        speculation.record(own, 2)

    assert draft == [5, 6]


def test_a_draft_of_forced_ids_has_at_most_the_bound() -> None:
    (draft,) = Speculation().drafts([Candidate(SpeculativeSequence(), [1, 2], 100, [7] * 40)])

    assert draft == [7] * MOST_DRAFTED


def test_a_grammar_that_fails_gives_no_draft_and_leaves_the_error_to_the_engine() -> None:
    class Failing:
        consumed = 0

        def advance(self, ids: Sequence[int]) -> None:
            raise RuntimeError("on purpose")

    spec = SequenceSpec(1, [1, 2, 3], 3, SamplingParams(seed=0, max_tokens=5))
    live = Run(EchoEngine()).scheduler.add(spec, Failing())

    assert live.candidate().forced == []
