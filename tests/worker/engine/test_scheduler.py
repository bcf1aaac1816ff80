"""The scheduler computes every token once, in order, within its bounds, and loses no sequence."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.engine.echo import EOS_ID, EchoEngine
from headrace.worker.engine.scheduler import Ending, LiveSequence, Scheduler, Update
from headrace.worker.engine.seam import Fault, SamplingParams, Token


@dataclass(frozen=True)
class Arrival:
    """A sequence of a random run, and the step at which it comes, leaves or expires."""

    length: int
    max_tokens: int
    at: int
    cancelled_at: int | None
    expires_at: int | None
    ignore_eos: bool


ARRIVALS = st.builds(
    Arrival,
    length=st.integers(1, 40),
    max_tokens=st.integers(1, 20),
    at=st.integers(0, 15),
    cancelled_at=st.one_of(st.none(), st.none(), st.integers(0, 30)),
    expires_at=st.one_of(st.none(), st.none(), st.integers(1, 30)),
    ignore_eos=st.booleans(),
)


def sequence(key: int, arrival: Arrival) -> LiveSequence[int]:
    return LiveSequence(
        key=key,
        ids=[(key + place) % 256 for place in range(arrival.length)],
        prompt=arrival.length,
        params=SamplingParams(seed=0, max_tokens=arrival.max_tokens, ignore_eos=arrival.ignore_eos),
        expires=None if arrival.expires_at is None else float(arrival.expires_at),
        submitted=float(arrival.at),
    )


@given(
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=12),
    slots=st.integers(1, 4),
    step_tokens=st.integers(1, 24),
)
def test_random_traffic_is_computed_exactly_and_ends_once(
    arrivals: list[Arrival], slots: int, step_tokens: int
) -> None:
    engine = EchoEngine(max_running=slots, context_length=64)
    scheduler: Scheduler[int] = Scheduler(engine.model, step_tokens=step_tokens)
    said: dict[int, list[int]] = {key: [] for key in range(len(arrivals))}
    endings: dict[int, Ending] = {}

    def book(updates: list[Update[int]], freed: list[int]) -> None:
        for update in updates:
            key = update.sequence.key
            assert key not in endings, "an update came after the end"
            assert update.offset == len(said[key])
            said[key] += update.token_ids
            if update.ending is not None:
                endings[key] = update.ending
        for slot in freed:
            engine.release(slot)

    for step in range(1000):
        for key, arrival in enumerate(arrivals):
            if arrival.at == step:
                scheduler.add(sequence(key, arrival))
            if arrival.cancelled_at == step:
                scheduler.cancel(key)
        book(*scheduler.expel(float(step)))
        rows = scheduler.plan(float(step))
        assert len({row.slot for row in rows}) == len(rows) <= slots
        assert sum(row.stop - row.start for row in rows) <= max(step_tokens, slots)
        if rows:
            book(*scheduler.apply(rows, engine.step(rows), float(step)))  # the engine checks the starts
        if len(endings) == len(arrivals):
            break

    assert scheduler.idle
    assert (scheduler.running, scheduler.waiting, engine.occupied_slots) == (0, 0, 0)
    for key, arrival in enumerate(arrivals):
        prompt = [(key + place) % 256 for place in range(arrival.length)]
        echo = [prompt[place % len(prompt)] for place in range(len(said[key]))]
        assert said[key] == echo
        match endings[key]:
            case Ending.STOP:
                assert said[key] == prompt
                assert not arrival.ignore_eos
            case Ending.LENGTH:
                assert len(said[key]) == arrival.max_tokens or arrival.length + len(said[key]) == 64
            case Ending.CANCELLED:
                assert arrival.cancelled_at is not None
            case Ending.DEADLINE:
                assert arrival.expires_at is not None


def plain(key: int, length: int, **params: int) -> LiveSequence[int]:
    return sequence(key, Arrival(length, params.get("max_tokens", 5), 0, None, None, True))


def test_decodes_go_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    engine = EchoEngine(max_running=4, context_length=1000)
    scheduler: Scheduler[int] = Scheduler(engine.model, step_tokens=10)
    scheduler.add(plain(0, 3, max_tokens=50))
    rows = scheduler.plan(0.0)
    scheduler.apply(rows, engine.step(rows), 0.0)
    scheduler.add(plain(1, 100))

    for _ in range(5):
        rows = scheduler.plan(0.0)
        updates, _ = scheduler.apply(rows, engine.step(rows), 0.0)

        assert [row.stop - row.start for row in rows] == [1, 9]
        assert [update.sequence.key for update in updates] == [0], "the long prompt says nothing yet"


def test_sequences_take_free_places_in_order_of_arrival() -> None:
    engine = EchoEngine(max_running=2)
    scheduler: Scheduler[int] = Scheduler(engine.model)
    for key in range(4):
        scheduler.add(plain(key, 2, max_tokens=1))

    rows = scheduler.plan(0.0)
    assert (scheduler.running, scheduler.waiting) == (2, 2)
    updates, freed = scheduler.apply(rows, engine.step(rows), 0.0)
    for slot in freed:
        engine.release(slot)
    rows = scheduler.plan(1.0)

    assert [update.sequence.key for update in updates] == [0, 1]
    assert [row.ids[0] for row in rows] == [2, 3]


def test_a_fault_ends_its_row_alone() -> None:
    engine = EchoEngine(max_running=2)
    scheduler: Scheduler[int] = Scheduler(engine.model)
    scheduler.add(plain(0, 1))
    scheduler.add(plain(1, 1))
    rows = scheduler.plan(0.0)

    updates, freed = scheduler.apply(rows, [Fault("broken"), Token(7)], 0.0)

    assert [(update.ending, update.fault, update.token_ids) for update in updates] == [
        (Ending.FAULT, "broken", []),
        (None, "", [7]),
    ]
    assert freed == [0]


def test_the_end_of_turn_token_is_not_part_of_the_answer_unless_ignored() -> None:
    for ignore_eos, expected in ((False, []), (True, [EOS_ID])):
        scheduler: Scheduler[int] = Scheduler(EchoEngine().model)
        scheduler.add(sequence(0, Arrival(1, 5, 0, None, None, ignore_eos)))
        (update,), _ = scheduler.apply(scheduler.plan(0.0), [Token(EOS_ID)], 0.0)

        assert update.token_ids == expected
        assert (update.ending is Ending.STOP) == (not ignore_eos)


def test_resumed_tokens_count_towards_max_tokens_and_offsets() -> None:
    scheduler: Scheduler[int] = Scheduler(EchoEngine().model)
    resumed = plain(0, 3, max_tokens=4)
    resumed.ids += [9, 9, 9]
    resumed.resumed = 3
    scheduler.add(resumed)
    rows = scheduler.plan(0.0)

    (update,), _ = scheduler.apply(rows, [Token(8)], 0.0)

    assert (rows[0].start, rows[0].stop) == (0, 6)
    assert (update.offset, update.token_ids, update.ending) == (3, [8], Ending.LENGTH)
