"""Steps that are planned one ahead of their results give the same answers, and share nothing unconfirmed."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine.echo import EOS_ID
from headrace.worker.runner import FinishReason
from tests.worker.engine.plan.device import DeviceEngine, HashEngine, hashed
from tests.worker.engine.plan.scheduling import Arrival, Run, sequence
from tests.worker.engine.plan.test_scheduler import ARRIVALS

CONTEXT = 64


def answered(key: int, arrival: Arrival) -> tuple[list[int], FinishReason]:
    """Return the answer of the hash engine, and why it ends."""
    spec = sequence(key, arrival)
    ids = list(spec.ids)
    while len(ids) < min(CONTEXT, spec.prompt + arrival.max_tokens):
        token = hashed(ids, may_end=not arrival.ignore_eos)
        if token == EOS_ID and not arrival.ignore_eos:
            return ids[spec.prompt :], FinishReason.STOP
        ids.append(token)
    return ids[spec.prompt :], FinishReason.LENGTH


def run_all(run: Run, arrivals: Sequence[Arrival]) -> None:
    """Run all arrivals with their cancellations to the end."""
    run.arrive(arrivals)
    run.finish(within=2 * sum(arrival.shared + arrival.own + arrival.max_tokens + 2 for arrival in arrivals))


@given(
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=12),
    max_running=st.integers(1, 4),
    step_tokens=st.integers(1, 24),
    block_tokens=st.integers(1, 6),
    spare_blocks=st.integers(0, 10),
    prefix_cache=st.booleans(),
    failing=st.frozensets(st.integers(0, 60), max_size=2),
    faulty=st.frozensets(st.tuples(st.integers(0, 60), st.integers(0, 3)), max_size=2),
)
@settings(max_examples=400, deadline=None)
def test_random_traffic_gets_the_same_answers_one_step_ahead(
    arrivals: list[Arrival],
    max_running: int,
    step_tokens: int,
    block_tokens: int,
    spare_blocks: int,
    prefix_cache: bool,
    failing: frozenset[int],
    faulty: frozenset[tuple[int, int]],
) -> None:
    """Shared prefixes, ends, preemptions, cancels, deadlines, and steps or rows that fail."""
    for ahead in (0, 1):
        engine = HashEngine(
            max_running=max_running,
            context_length=CONTEXT,
            block_tokens=block_tokens,
            kv_blocks=-(-CONTEXT // block_tokens) + spare_blocks,
        )
        run = Run(DeviceEngine(engine, failing, faulty, ahead), step_tokens, prefix_cache)
        run_all(run, arrivals)

        assert set(run.endings) == set(range(len(arrivals)))
        assert ahead or not run.dropped
        for key, arrival in enumerate(arrivals):
            answer, (expected, reason) = run.answers[key], answered(key, arrival)
            match run.endings[key]:
                case FinishReason.CANCELLED:
                    assert arrival.cancelled_at is not None
                case FinishReason.DEADLINE:
                    assert arrival.deadline_at is not None
                case FinishReason.FAULT:
                    assert key in run.failed
                case ended:
                    assert (answer, ended) == (expected, reason)
            assert answer == expected[: len(answer)]


def ahead_of(*, failing: Sequence[int] = (), prefix_cache: bool = True, **options: int) -> Run:
    """Return a run one step ahead, with blocks of 4 tokens."""
    engine = HashEngine(**{"block_tokens": 4, "max_running": 4, **options})
    return Run(DeviceEngine(engine, frozenset(failing)), step_tokens=64, prefix_cache=prefix_cache)


def test_a_sequence_decodes_on_before_its_last_token_is_known() -> None:
    run = ahead_of()
    run.add(sequence(0, Arrival(0, 5, 3)))
    rows = [[(row.start, row.stop, row.pending) for row in run.step()] for _ in range(5)]

    assert rows == [[(0, 5, False)], [(5, 6, True)], [(6, 7, True)], [], []], "no row follows its last token"
    assert run.endings == {0: FinishReason.LENGTH}
    assert run.dropped == 0


def test_the_token_after_the_end_of_a_turn_is_dropped_and_counted() -> None:
    ending = next(key for key in range(100) if answered(key, Arrival(0, 5, 30, ignore_eos=False))[0] == [])
    run = ahead_of()
    run.add(sequence(ending, Arrival(0, 5, 30, ignore_eos=False)))
    run.finish(within=5)

    assert (run.answers[ending], run.endings[ending]) == ([], FinishReason.STOP)
    assert run.dropped == 1


def test_a_preempted_sequence_keeps_its_pending_token_and_waits_until_it_is_known() -> None:
    run = ahead_of(context_length=32, kv_blocks=8, max_running=2, prefix_cache=False)
    arrivals = [Arrival(0, 8, 24), Arrival(0, 8, 12)]
    for key, arrival in enumerate(arrivals):
        run.add(sequence(key, arrival))
    while not run.sequences[1].preempted:
        run.step()
    known = len(run.answers[1])
    run.finish(within=100)

    assert known > 0
    assert run.scheduler.preemptions == 1
    assert run.dropped == 0
    assert [run.answers[key] for key in (0, 1)] == [
        answered(key, each)[0] for key, each in enumerate(arrivals)
    ]


def test_a_prefix_is_shared_once_the_step_that_computes_it_has_returned() -> None:
    run = ahead_of()
    run.add(sequence(0, Arrival(16, 1, 9)))
    run.step()
    run.add(sequence(1, Arrival(16, 3, 9)))

    first, second = run.step(), run.step()

    assert [(row.start, row.stop) for row in first] == [(17, 18)], "the other one does not compute it as well"
    assert [(row.start, row.stop) for row in second] == [(18, 19), (16, 19)]
    assert run.scheduler.cached_tokens == 16


def test_what_a_failed_step_computed_is_not_shared_with_the_step_in_flight_after_it() -> None:
    run = ahead_of(failing=[0])
    run.add(sequence(0, Arrival(16, 1, 9)))
    run.step()
    for key in (1, 2):
        run.add(sequence(key, Arrival(16 * (key == 1), 3, 2)))
    run.step()  # the first has failed, but the second row of 0 and the first of 2 are in flight
    run.finish(within=9)

    assert run.endings == {0: FinishReason.FAULT, 1: FinishReason.LENGTH, 2: FinishReason.LENGTH}
    assert (run.scheduler.cached_tokens, run.dropped) == (0, 1)


def test_a_sequence_that_ends_while_a_step_is_in_flight_frees_its_blocks_immediately() -> None:
    run = ahead_of(context_length=32, kv_blocks=8)
    run.add(sequence(0, Arrival(0, 28, 4)))
    run.step()
    run.scheduler.cancel([0])
    run.add(sequence(1, Arrival(0, 30, 2)))

    (row,) = run.step()
    run.finish(within=5)

    assert (row.start, row.stop) == (0, 30)
    assert run.dropped == 1
    assert run.answers[1] == answered(1, Arrival(0, 30, 2))[0]
