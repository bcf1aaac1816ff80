"""The scheduler computes every token once, in order, within its bounds, and loses no sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine.echo import EOS_ID, EchoEngine
from headrace.worker.engine.interface import Fault, Row, SamplingParams, Token
from headrace.worker.engine.plan.scheduler import PRIORITY_SECONDS, Ending, LiveSequence, Scheduler, Update


@dataclass(frozen=True)
class Arrival:
    """A sequence of a random run, and the step at which it comes, leaves or expires.

    family    sequences of one family begin alike
    shared    how many of its first ids the whole family has
    resumed   how much of its answer came with it
    """

    shared: int
    own: int
    max_tokens: int
    family: int = 0
    resumed: int = 0
    priority: int = 5
    at: int = 0
    cancelled_at: int | None = None
    expires_at: int | None = None
    ignore_eos: bool = True

    def prompt(self, key: int) -> list[int]:
        """Ids that tell families, places and, in the end, sequences apart."""
        shared = [(50 * self.family + place) % 256 for place in range(self.shared)]
        return shared + [(7 * key + 13 * place) % 256 for place in range(self.own)]

    def echo(self, key: int, tokens: int) -> list[int]:
        """The first tokens of what the echo engine answers, whatever else goes on."""
        prompt = self.prompt(key)
        return [prompt[place % len(prompt)] for place in range(tokens)]


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
    expires_at=st.one_of(st.none(), st.none(), st.none(), st.integers(1, 30)),
    ignore_eos=st.booleans(),
)


def sequence(key: int, arrival: Arrival) -> LiveSequence[int]:
    prompt = arrival.prompt(key)
    resumed = min(arrival.resumed, arrival.max_tokens - 1)
    if not arrival.ignore_eos:
        resumed = min(resumed, len(prompt))
    return LiveSequence(
        key=key,
        ids=prompt + arrival.echo(key, resumed),
        prompt=len(prompt),
        params=SamplingParams(seed=0, max_tokens=arrival.max_tokens, ignore_eos=arrival.ignore_eos),
        expires=None if arrival.expires_at is None else float(arrival.expires_at),
        submitted=float(arrival.at),
        resumed=resumed,
        priority=arrival.priority,
    )


@dataclass
class Run:
    """A scheduler on an echo engine, whose books are checked after each step.

    The engine refuses a row whose blocks do not hold exactly what the row says is computed, so that no
    sequence ever builds on another one's keys.
    """

    engine: EchoEngine
    step_tokens: int = 512
    prefix_cache: bool = True
    steps: int = 0
    said: dict[int, list[int]] = field(default_factory=dict)
    endings: dict[int, Ending] = field(default_factory=dict)
    ended_at: dict[int, int] = field(default_factory=dict)
    sequences: dict[int, LiveSequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler: Scheduler[int] = Scheduler(
            self.engine.model, step_tokens=self.step_tokens, prefix_cache=self.prefix_cache
        )

    def add(self, added: LiveSequence[int]) -> None:
        self.scheduler.add(added)
        self.sequences[added.key] = added
        self.said[added.key] = list(added.ids[added.prompt :])

    def step(self) -> list[Row]:
        """One turn of the engine's loop, one second after the last."""
        now, model = float(self.steps), self.engine.model
        self.steps += 1
        self._book(self.scheduler.expel(now))
        rows = self.scheduler.plan(now)
        assert bool(rows) != self.scheduler.idle, "there is work, and nothing is planned"
        assert len(rows) <= model.max_running
        assert sum(row.stop - row.start for row in rows) <= max(self.step_tokens, model.max_running)
        size = model.block_tokens
        writers = [b for row in rows for b in row.blocks[row.start // size : (row.stop - 1) // size + 1]]
        tables = Counter(b for row in rows for b in row.blocks[: -(-row.stop // size)])
        assert all(tables[b] == 1 for b in writers), "a row writes to a block of another one"
        if rows:
            self._book(self.scheduler.apply(rows, self.engine.step(rows), now))
        self.scheduler.check()
        return rows

    def finish(self, within: int) -> None:
        """Go on until everything has ended."""
        for _ in range(within):
            if self.scheduler.idle:
                break
            self.step()
        scheduler = self.scheduler
        assert scheduler.idle, f"after {within} steps {scheduler.running} run and {scheduler.waiting} wait"
        assert (scheduler.running, scheduler.waiting, scheduler.uncomputed_prompt_tokens) == (0, 0, 0)
        assert scheduler.kv_tokens_free == self.engine.model.kv_tokens, "a block leaked"

    def _book(self, updates: Iterable[Update[int]]) -> None:
        for update in updates:
            key = update.sequence.key
            assert key not in self.endings, "an update came after the end"
            assert update.offset == len(self.said[key]), "an offset was repeated or left out"
            self.said[key] += update.token_ids
            if update.ending is not None:
                self.endings[key] = update.ending
                self.ended_at[key] = self.steps


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
    for step in range(31):
        for key, arrival in enumerate(arrivals):
            if arrival.at == step:
                run.add(sequence(key, arrival))
            if arrival.cancelled_at == step:
                run.scheduler.cancel(key)
        run.step()
    # The first in rank of those that run advances in every step and is never preempted.
    run.finish(within=sum(arrival.shared + arrival.own + arrival.max_tokens for arrival in arrivals))

    assert set(run.endings) == set(range(len(arrivals)))
    for key, arrival in enumerate(arrivals):
        said, prompt = run.said[key], arrival.prompt(key)
        assert said == arrival.echo(key, len(said))
        match run.endings[key]:
            case Ending.STOP:
                assert said == prompt
                assert not arrival.ignore_eos
            case Ending.LENGTH:
                assert len(said) == arrival.max_tokens or len(prompt) + len(said) == context
            case Ending.CANCELLED:
                assert arrival.cancelled_at is not None
            case Ending.DEADLINE:
                assert arrival.expires_at is not None
            case Ending.FAULT:
                raise AssertionError("nothing failed")


def test_decodes_go_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    run = Run(EchoEngine(max_running=4, context_length=1000), step_tokens=10)
    run.add(sequence(0, Arrival(0, 3, 50)))
    run.step()
    run.add(sequence(1, Arrival(0, 100, 5)))

    for _ in range(5):
        rows = run.step()

        assert [row.stop - row.start for row in rows] == [1, 9]
    assert (len(run.said[0]), run.said[1]) == (6, []), "the long prompt says nothing yet"


def test_a_short_prompt_passes_a_long_one_in_one_step() -> None:
    run = Run(EchoEngine(max_running=8, context_length=4096), step_tokens=128)
    run.add(sequence(0, Arrival(0, 4000, 5)))
    for _ in range(3):
        run.step()
    run.add(sequence(1, Arrival(0, 16, 5)))

    rows = run.step()

    assert len(run.said[1]) == 1
    assert sorted(row.stop - row.start for row in rows) == [16, 112], "the long one gets what is left"


def test_a_stream_of_short_prompts_does_not_stall_a_long_one() -> None:
    run = Run(EchoEngine(max_running=8, context_length=4096), step_tokens=64)
    run.add(sequence(0, Arrival(0, 3000, 1)))
    for key in range(1, 600):
        run.add(sequence(key, Arrival(0, 60, 1)))

    while 0 not in run.endings:
        run.step()

    assert run.ended_at[0] <= 3000 / 32 + 1, "half of each step is for the first in rank"
    assert len(run.endings) > 40, "and the other half for the short ones"


def test_sequences_take_free_places_in_order_of_arrival() -> None:
    run = Run(EchoEngine(max_running=2))
    for key in range(4):
        run.add(sequence(key, Arrival(0, 2, 1)))

    run.step()
    assert (set(run.endings), run.scheduler.waiting) == ({0, 1}, 2)
    run.step()

    assert set(run.endings) == {0, 1, 2, 3}


def test_urgent_sequences_start_first_but_nobody_waits_for_ever() -> None:
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
    # Those that came within eight levels' time may pass; each takes four steps of one second.
    assert order.index(1) <= 1 + 8 * PRIORITY_SECONDS / 4 + 1


def test_a_decode_without_memory_preempts_the_last_in_rank_which_carries_on_later() -> None:
    engine = EchoEngine(max_running=2, context_length=32, block_tokens=4, kv_blocks=8)
    run = Run(engine, prefix_cache=False)
    run.add(sequence(0, Arrival(0, 8, 24)))
    run.add(sequence(1, Arrival(0, 8, 12)))
    run.finish(within=100)

    assert (run.sequences[0].preempted, run.sequences[1].preempted) == (0, 1)
    assert run.scheduler.preemptions == 1
    assert run.ended_at[0] < run.ended_at[1]
    assert [len(run.said[key]) for key in (0, 1)] == [24, 12]
    assert run.said[1] == Arrival(0, 8, 12).echo(1, 12)


def test_a_sequence_does_not_start_into_the_last_blocks_that_others_will_ask_for() -> None:
    """It would have to leave again at once."""
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


def test_what_a_preempted_sequence_computed_is_found_again_if_memory_was_left_alone() -> None:
    """The one that made it leave may end before it has used up what it left."""
    engine = EchoEngine(max_running=2, context_length=32, block_tokens=4, kv_blocks=8)
    run = Run(engine, step_tokens=64)
    run.add(sequence(0, Arrival(0, 12, 6)))
    run.add(sequence(1, Arrival(0, 15, 4)))
    chunks: list[int] = []
    while 1 not in run.endings:
        chunks += [row.stop - row.start for row in run.step() if row.ids is run.sequences[1].ids]

    assert run.sequences[1].preempted == 1
    assert chunks[0] == 15
    assert max(chunks[1:]) < 15, "its first blocks were still there"
    assert run.sequences[1].cached == 0, "it found nobody else's"


def test_a_prompt_that_begins_like_an_earlier_one_starts_behind_it() -> None:
    run = Run(EchoEngine(block_tokens=4))
    run.add(sequence(0, Arrival(20, 3, 2)))
    run.finish(within=5)
    run.add(sequence(1, Arrival(20, 5, 2)))

    rows = run.step()

    assert [(row.start, row.stop) for row in rows] == [(20, 25)]
    assert (run.sequences[0].cached, run.sequences[1].cached) == (0, 20)
    assert run.scheduler.cached_tokens == 20


def test_the_next_turn_of_a_conversation_finds_prompt_and_answer_of_the_last() -> None:
    run = Run(EchoEngine(block_tokens=4))
    run.add(sequence(0, Arrival(0, 10, 12)))
    run.finish(within=20)
    history = run.sequences[0].ids
    params = SamplingParams(seed=0, max_tokens=1)
    run.add(LiveSequence(1, [*history, 3, 4, 5], len(history) + 3, params, None, 0.0))

    (row,) = run.step()

    assert len(history) == 22
    assert row.start == 20, "all blocks that the last turn filled; its last token was never computed"


def test_an_equal_prompt_finds_all_but_what_its_first_token_needs() -> None:
    run = Run(EchoEngine(block_tokens=4))
    for key in range(2):
        run.add(sequence(key, Arrival(16, 0, 1)))
        (row,) = run.step()

    assert (row.start, row.stop, row.sample) == (12, 16, True)


def test_prompts_that_begin_alike_and_come_together_compute_it_once() -> None:
    run = Run(EchoEngine(block_tokens=4), step_tokens=64)
    for key in range(5):
        run.add(sequence(key, Arrival(40, 3, 1)))
    rows = [row for _ in range(2) for row in run.step()]

    assert len(run.endings) == 5, "it takes them one step more"
    assert sum(row.stop - row.start for row in rows) == 40 + 5 * 3
    assert [run.sequences[key].cached for key in range(5)] == [0, 40, 40, 40, 40]


def test_without_prefix_cache_everything_is_computed() -> None:
    run = Run(EchoEngine(block_tokens=4), prefix_cache=False)
    for key in range(2):
        run.add(sequence(key, Arrival(20, 3, 1)))
        (row,) = run.step()
        assert (row.start, row.stop) == (0, 23)

    assert run.sequences[1].cached == 0


def test_a_fault_ends_its_row_alone_and_nobody_builds_on_its_keys() -> None:
    scheduler: Scheduler[int] = Scheduler(EchoEngine(block_tokens=4).model, step_tokens=64)
    scheduler.add(sequence(0, Arrival(30, 70, 5)))
    scheduler.apply(scheduler.plan(0.0), [None], 0.0)
    scheduler.add(sequence(1, Arrival(0, 1, 5)))
    rows = scheduler.plan(0.0)

    updates = scheduler.apply(rows, [Fault("broken"), Token(7)], 0.0)

    assert [(update.ending, update.fault, update.token_ids) for update in updates] == [
        (Ending.FAULT, "broken", []),
        (None, "", [7]),
    ]
    scheduler.check()
    scheduler.add(sequence(2, Arrival(30, 70, 5)))
    assert scheduler.plan(0.0)[-1].start == 0


def test_what_can_never_fit_is_refused_at_once() -> None:
    scheduler: Scheduler[int] = Scheduler(EchoEngine(context_length=16).model)

    with pytest.raises(ValueError, match="1 to 15 ids, not 16"):
        scheduler.add(sequence(0, Arrival(0, 16, 5)))
    with pytest.raises(ValueError, match="does not fit a KV memory of 60"):
        EchoEngine(context_length=64, block_tokens=4, kv_blocks=15)
    assert scheduler.idle


def test_the_end_of_turn_token_is_not_part_of_the_answer_unless_ignored() -> None:
    for ignore_eos, expected in ((False, []), (True, [EOS_ID])):
        scheduler: Scheduler[int] = Scheduler(EchoEngine().model)
        scheduler.add(sequence(0, Arrival(0, 1, 5, ignore_eos=ignore_eos)))
        (update,) = scheduler.apply(scheduler.plan(0.0), [Token(EOS_ID)], 0.0)

        assert update.token_ids == expected
        assert (update.ending is Ending.STOP) == (not ignore_eos)


def test_resumed_tokens_count_towards_max_tokens_and_offsets() -> None:
    scheduler: Scheduler[int] = Scheduler(EchoEngine().model)
    scheduler.add(sequence(0, Arrival(0, 3, 4, resumed=3)))
    rows = scheduler.plan(0.0)

    (update,) = scheduler.apply(rows, [Token(8)], 0.0)

    assert (rows[0].start, rows[0].stop) == (0, 6)
    assert (update.offset, update.token_ids, update.ending) == (3, [8], Ending.LENGTH)
