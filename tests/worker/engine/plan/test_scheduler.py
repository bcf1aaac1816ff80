"""The scheduler computes every token once, in order, within its bounds, and loses no sequence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine.echo import EOS_ID, EchoEngine
from headrace.worker.engine.interface import Fault, Token
from headrace.worker.engine.plan.scheduler import PRIORITY_SECONDS, Scheduler
from headrace.worker.runner import FinishReason, SamplingParams, SequenceSpec
from tests.worker.engine.plan.scheduling import Arrival, Run, sequence

ARRIVALS = st.builds(
    Arrival,
    shared=st.integers(0, 30),
    own=st.integers(1, 12),
    max_tokens=st.integers(1, 20),
    family=st.integers(0, 1),
    resumed=st.sampled_from([0, 0, 0, 1, 5]),
    priority=st.sampled_from([5, 5, 5, 0, 9]),
    at=st.integers(0, 15),
    cancelled_at=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 30)),
    deadline_at=st.one_of(st.none(), st.none(), st.none(), st.integers(1, 30)),
    ignore_eos=st.booleans(),
)


@given(
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=12),
    max_running=st.integers(1, 4),
    step_tokens=st.integers(1, 24),
    block_tokens=st.integers(1, 6),
    spare_blocks=st.integers(0, 10),
    prefix_cache=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_random_traffic_is_computed_exactly_and_ends_once(
    arrivals: list[Arrival],
    max_running: int,
    step_tokens: int,
    block_tokens: int,
    spare_blocks: int,
    prefix_cache: bool,
) -> None:
    """Shared prefixes, resumption, cancels, deadlines and KV memory for little more than one sequence."""
    context = 64
    engine = EchoEngine(
        max_running=max_running,
        context_length=context,
        block_tokens=block_tokens,
        kv_blocks=-(-context // block_tokens) + spare_blocks,
    )
    run = Run(engine, step_tokens, prefix_cache)
    run.arrive(arrivals)
    # The first running sequence in rank advances in every step and is never preempted.
    run.finish(within=sum(arrival.shared + arrival.own + arrival.max_tokens for arrival in arrivals))

    assert set(run.endings) == set(range(len(arrivals)))
    for key, arrival in enumerate(arrivals):
        answer, prompt = run.answers[key], arrival.prompt(key)
        assert answer == arrival.echo(key, len(answer))
        match run.endings[key]:
            case FinishReason.STOP:
                assert answer == prompt
                assert not arrival.ignore_eos
            case FinishReason.LENGTH:
                assert len(answer) == arrival.max_tokens or len(prompt) + len(answer) == context
            case FinishReason.CANCELLED:
                assert arrival.cancelled_at is not None
            case FinishReason.DEADLINE:
                assert arrival.deadline_at is not None
            case FinishReason.FAULT:
                raise AssertionError("nothing failed")


def test_decodes_continue_while_a_long_prompt_is_computed_in_chunks() -> None:
    run = Run(EchoEngine(max_running=4, context_length=1000), step_tokens=10)
    run.add(sequence(0, Arrival(0, 3, 50)))
    run.step()
    run.add(sequence(1, Arrival(0, 100, 5)))

    for _ in range(5):
        rows = run.step()

        assert [row.stop - row.start for row in rows] == [1, 9]
    assert (len(run.answers[0]), run.answers[1]) == (6, []), "the long prompt has no token yet"


def test_a_short_prompt_passes_a_long_one_in_one_step() -> None:
    run = Run(EchoEngine(max_running=8, context_length=4096), step_tokens=128)
    run.add(sequence(0, Arrival(0, 4000, 5)))
    for _ in range(3):
        run.step()
    run.add(sequence(1, Arrival(0, 16, 5)))

    rows = run.step()

    assert len(run.answers[1]) == 1
    assert sorted(row.stop - row.start for row in rows) == [16, 112], "the long one gets the rest"


def test_a_stream_of_short_prompts_does_not_stall_a_long_one() -> None:
    run = Run(EchoEngine(max_running=8, context_length=4096), step_tokens=64)
    run.add(sequence(0, Arrival(0, 3000, 1)))
    for key in range(1, 600):
        run.add(sequence(key, Arrival(0, 60, 1)))

    while 0 not in run.endings:
        run.step()

    assert run.ended_at[0] <= 3000 / 32 + 1, "half of each step is for the first in rank"
    assert len(run.endings) > 40, "and the other half for the short ones"


def test_sequences_take_free_slots_in_order_of_arrival() -> None:
    run = Run(EchoEngine(max_running=2))
    for key in range(4):
        run.add(sequence(key, Arrival(0, 2, 1)))

    run.step()
    assert (set(run.endings), run.scheduler.waiting) == ({0, 1}, 2)
    run.step()

    assert set(run.endings) == {0, 1, 2, 3}


def test_urgent_sequences_start_first_but_no_sequence_starves() -> None:
    run = Run(EchoEngine(max_running=1))
    run.add(sequence(0, Arrival(0, 2, 4, priority=9)))
    run.add(sequence(1, Arrival(0, 2, 4, priority=1)))
    for key in range(2, 40):
        while 4 * (key - 1) > run.steps:
            run.step()
        run.add(sequence(key, Arrival(0, 2, 4, priority=9, at=run.steps)))
    run.finish(within=1000)

    order = sorted(run.ended_at, key=lambda key: run.ended_at[key])
    assert order.index(1) > 1, "the urgent ones went first"
    # Only those that arrive within eight levels' time may overtake; each takes four steps of one second.
    assert order.index(1) <= 1 + 8 * PRIORITY_SECONDS / 4 + 1


def test_a_decode_without_memory_preempts_the_last_in_rank_which_resumes_later() -> None:
    engine = EchoEngine(max_running=2, context_length=32, block_tokens=4, kv_blocks=8)
    run = Run(engine, prefix_cache=False)
    run.add(sequence(0, Arrival(0, 8, 24)))
    run.add(sequence(1, Arrival(0, 8, 12)))
    run.finish(within=100)

    assert (run.sequences[0].preempted, run.sequences[1].preempted) == (0, 1)
    assert run.scheduler.preemptions == 1
    assert run.ended_at[0] < run.ended_at[1]
    assert [len(run.answers[key]) for key in (0, 1)] == [24, 12]
    assert run.answers[1] == Arrival(0, 8, 12).echo(1, 12)


def test_a_sequence_does_not_start_in_the_last_blocks_that_others_will_need() -> None:
    """It would be preempted immediately."""
    engine = EchoEngine(max_running=4, context_length=64, block_tokens=4, kv_blocks=32)
    run = Run(engine, prefix_cache=False)
    run.add(sequence(0, Arrival(0, 40, 20)))
    run.step()
    run.add(sequence(1, Arrival(0, 40, 20)))
    run.step()
    run.add(sequence(2, Arrival(0, 38, 1)))
    run.step()
    assert run.scheduler.kv_tokens_free == 4 * (32 - 10 - 1 - 10 - 1), "the third needs all of these"
    run.finish(within=100)

    assert run.scheduler.preemptions == 0


def test_what_a_preempted_sequence_computed_stays_cached_while_memory_is_not_needed() -> None:
    """The sequence that preempted it may end before it has used all the freed blocks."""
    engine = EchoEngine(max_running=2, context_length=32, block_tokens=4, kv_blocks=8)
    run = Run(engine, step_tokens=64)
    run.add(sequence(0, Arrival(0, 12, 6)))
    run.add(sequence(1, Arrival(0, 15, 4)))
    chunks: list[int] = []
    while 1 not in run.endings:
        chunks += [row.stop - row.start for row in run.step() if row.ids is run.sequences[1].ids]

    assert run.sequences[1].preempted == 1
    assert chunks[0] == 15
    assert max(chunks[1:]) < 15, "its first blocks were still cached"
    assert run.sequences[1].cached == 0, "none of them was another sequence's"


def test_a_prompt_that_shares_a_prefix_with_an_earlier_one_starts_after_it() -> None:
    run = Run(EchoEngine(block_tokens=4))
    run.add(sequence(0, Arrival(20, 3, 2)))
    run.finish(within=5)
    run.add(sequence(1, Arrival(20, 5, 2)))

    rows = run.step()

    assert [(row.start, row.stop) for row in rows] == [(20, 25)]
    assert (run.sequences[0].cached, run.sequences[1].cached) == (0, 20)
    assert run.scheduler.cached_tokens == 20


def test_the_next_turn_of_a_conversation_finds_prompt_and_answer_of_the_last_cached() -> None:
    run = Run(EchoEngine(block_tokens=4))
    run.add(sequence(0, Arrival(0, 10, 12)))
    run.finish(within=20)
    history = run.sequences[0].ids
    params = SamplingParams(seed=0, max_tokens=1)
    run.add(SequenceSpec(1, [*history, 3, 4, 5], len(history) + 3, params))

    (row,) = run.step()

    assert len(history) == 22
    assert row.start == 20, "all full blocks of the last turn; its last token was never computed"


def test_an_equal_prompt_finds_all_blocks_cached_but_the_one_its_first_token_needs() -> None:
    run = Run(EchoEngine(block_tokens=4))
    for key in range(2):
        run.add(sequence(key, Arrival(16, 0, 1)))
        (row,) = run.step()

    assert (row.start, row.stop, row.sample) == (12, 16, True)


def test_prompts_with_a_common_prefix_that_arrive_together_compute_it_once() -> None:
    run = Run(EchoEngine(block_tokens=4), step_tokens=64)
    for key in range(5):
        run.add(sequence(key, Arrival(40, 3, 1)))
    rows = [row for _ in range(2) for row in run.step()]

    assert len(run.endings) == 5, "it takes one step more"
    assert sum(row.stop - row.start for row in rows) == 40 + 5 * 3
    assert [run.sequences[key].cached for key in range(5)] == [0, 40, 40, 40, 40]


def test_without_prefix_cache_everything_is_computed() -> None:
    run = Run(EchoEngine(block_tokens=4), prefix_cache=False)
    for key in range(2):
        run.add(sequence(key, Arrival(20, 3, 1)))
        (row,) = run.step()
        assert (row.start, row.stop) == (0, 23)

    assert run.sequences[1].cached == 0


def test_a_fault_ends_only_its_row_and_its_keys_are_not_shared() -> None:
    scheduler: Scheduler[int] = Scheduler(EchoEngine(block_tokens=4).model, step_tokens=64)
    scheduler.add(sequence(0, Arrival(30, 70, 5)))
    scheduler.apply(scheduler.plan(0.0), [None], 0.0)
    scheduler.add(sequence(1, Arrival(0, 1, 5)))
    step = scheduler.plan(0.0)

    updates = scheduler.apply(step, [Fault("broken"), Token(7)], 0.0)

    assert [(update.finish, update.fault, update.token_ids) for update in updates] == [
        (FinishReason.FAULT, "broken", ()),
        (None, "", (7,)),
    ]
    scheduler.check()
    scheduler.add(sequence(2, Arrival(30, 70, 5)))
    assert scheduler.plan(0.0).rows[-1].start == 0


def test_a_sequence_that_can_never_fit_is_refused_immediately() -> None:
    scheduler: Scheduler[int] = Scheduler(EchoEngine(context_length=16).model)

    with pytest.raises(ValueError, match="1 to 15 ids, not 16"):
        scheduler.add(sequence(0, Arrival(0, 16, 5)))
    with pytest.raises(ValueError, match="does not fit a KV memory of 60"):
        EchoEngine(context_length=64, block_tokens=4, kv_blocks=15)
    assert scheduler.idle


def test_the_end_of_turn_token_is_not_part_of_the_answer_unless_ignored() -> None:
    for ignore_eos, expected in ((False, ()), (True, (EOS_ID,))):
        scheduler: Scheduler[int] = Scheduler(EchoEngine().model)
        scheduler.add(sequence(0, Arrival(0, 1, 5, ignore_eos=ignore_eos)))
        (update,) = scheduler.apply(scheduler.plan(0.0), [Token(EOS_ID)], 0.0)

        assert update.token_ids == expected
        assert (update.finish is FinishReason.STOP) == (not ignore_eos)


def test_resumed_tokens_count_towards_max_tokens_and_offsets() -> None:
    scheduler: Scheduler[int] = Scheduler(EchoEngine().model)
    scheduler.add(sequence(0, Arrival(0, 3, 4, resumed=3)))
    step = scheduler.plan(0.0)

    (update,) = scheduler.apply(step, [Token(8)], 0.0)

    assert [(row.start, row.stop) for row in step.rows] == [(0, 6)]
    assert (update.offset, update.token_ids, update.finish) == (3, (8,), FinishReason.LENGTH)
