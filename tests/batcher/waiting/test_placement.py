"""Work goes where it is done soonest: by what waits there, by pace, and by what is computed already."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from headrace.batcher.waiting.estimates import RETRY_SECONDS, Arrivals, Mean, Pace, retry_after
from headrace.batcher.waiting.placement import Candidate, choose
from headrace.batcher.waiting.prefixes import BLOCK, Prefixes, blocks

IDLE = Candidate(name="a", room=8, sequences=0, backlog=0, budget=1000, rate=100.0)
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        name=st.sampled_from("abcdef"),
        room=st.integers(1, 9),
        sequences=st.integers(0, 9),
        backlog=st.integers(0, 3000),
        budget=st.integers(1, 3000),
        rate=st.floats(0, 1000),
        held=st.integers(0, 100),
        probation=st.booleans(),
    ),
    unique_by=lambda candidate: candidate.name,
)


@given(candidates=CANDIDATES, tokens=st.integers(1, 3000), avoid=st.sampled_from("abc"))
def test_whoever_is_chosen_takes_it_and_was_not_to_be_avoided_unless_alone(
    candidates: list[Candidate], tokens: int, avoid: str
) -> None:
    chosen = choose(candidates, tokens, avoid=avoid, probation=True)
    able = [one for one in candidates if one.takes(tokens) and not one.probation]

    assert (chosen is None) == (not able)
    if chosen is not None:
        assert chosen in able
        assert chosen.name != avoid or all(one.name == avoid for one in able)


def test_less_work_a_better_pace_or_a_held_prefix_decides() -> None:
    other = replace(IDLE, name="b")
    assert choose([replace(IDLE, backlog=500), other], 100) == other
    assert choose([replace(IDLE, sequences=3), other], 100) == other
    faster = replace(other, rate=200.0)
    assert choose([IDLE, faster], 100) == faster
    holder = replace(other, held=96, sequences=1)
    assert choose([IDLE, holder], 100) == holder


def test_an_idle_worker_takes_any_prompt_and_a_busy_one_no_more_than_it_can_soon_compute() -> None:
    assert IDLE.takes(100_000)
    assert not replace(IDLE, backlog=900).takes(200)
    assert replace(IDLE, backlog=900, held=150).takes(200)


def test_what_others_keep_waiting_at_a_worker_shuts_nobody_out_of_it() -> None:
    assert replace(IDLE, backlog=5000, others=5000).takes(200)
    assert not replace(IDLE, backlog=5001, others=5000).takes(200), "one of our own at a time"


@given(common=st.lists(st.integers(0, 999), max_size=200), tail=st.lists(st.integers(0, 999), max_size=70))
def test_prompts_share_exactly_the_blocks_of_their_common_beginning(
    common: list[int], tail: list[int]
) -> None:
    one, two = blocks([*common, 1000, *tail]), blocks([*common, 1001, *tail])
    shared = sum(left == right for left, right in zip(one, two, strict=True))

    assert shared == len(common) // BLOCK


def test_a_worker_is_remembered_for_what_it_computed_and_forgotten_with_its_memory() -> None:
    prefixes = Prefixes()
    names = blocks(range(BLOCK * 4 + 1))
    prefixes.expect(names[:2], "a")
    prefixes.expect(names, "b")

    assert prefixes.held(names, "a") == 2 * BLOCK
    assert prefixes.held(names, "b") == 4 * BLOCK
    prefixes.forget("b")
    assert (prefixes.held(names, "a"), prefixes.held(names, "b")) == (2 * BLOCK, 0)


GRAIN = 16


def test_a_worker_that_forgot_a_prompt_has_forgotten_all_that_it_had_used_before() -> None:
    prefixes = Prefixes()
    old, lost, new = (blocks([first] * (BLOCK * 3 + 1)) for first in (1, 2, 3))
    for names in (old, lost, new):
        prefixes.expect(names, "a")
        prefixes.computed(names, "a", 0, GRAIN)
    prefixes.expect(new, "b")
    assert [prefixes.held(names, "a") for names in (old, lost, new)] == [3 * BLOCK] * 3

    prefixes.expect(lost, "a")
    prefixes.computed(lost, "a", BLOCK, GRAIN)

    assert prefixes.held(old, "a") == 0
    assert prefixes.held(lost, "a") == 3 * BLOCK, "it was computed just now"
    assert prefixes.held(new, "a") == 3 * BLOCK, "it was used later"
    assert prefixes.held(new, "b") == 3 * BLOCK


def test_a_worker_that_found_what_it_was_thought_to_have_loses_nothing() -> None:
    prefixes = Prefixes()
    old, names = blocks([1] * (BLOCK * 3 + 1)), blocks([2] * (BLOCK * 3 + 1))
    for one in (old, names):
        prefixes.expect(one, "a")
        prefixes.computed(one, "a", 0, 64)
    prefixes.computed(names, "a", 64, 64)  # of 96 tokens blocks of 64 can hold so many

    assert prefixes.held(old, "a") == 3 * BLOCK


def test_what_was_sent_and_never_computed_says_nothing_of_what_a_worker_forgot() -> None:
    prefixes = Prefixes()
    held, sent = blocks([1] * (BLOCK * 3 + 1)), blocks([2] * (BLOCK * 3 + 1))
    prefixes.expect(held, "a")
    prefixes.computed(held, "a", 0, GRAIN)
    prefixes.expect(sent, "a")  # and its caller left
    prefixes.computed(sent, "a", 0, GRAIN)

    assert prefixes.held(held, "a") == 3 * BLOCK


@given(prompts=st.lists(st.lists(st.integers(0, 3), min_size=40, max_size=200), max_size=20))
def test_what_is_remembered_is_bounded(prompts: list[list[int]]) -> None:
    prefixes = Prefixes(limit=5)
    for ids in prompts:
        prefixes.expect(blocks(ids), "a")
        assert len(prefixes) <= 5


def test_a_first_token_takes_what_stands_before_it() -> None:
    pace = Pace(prefill=100.0, step_seconds=0.05, backlog=50)

    assert pace.first_token_in(jobs=1, ahead=30, tokens=20) == 1.0
    assert pace.tokens_in(21) == 1.0
    assert Pace(drained=2.0).first_token_in(jobs=9, ahead=0, tokens=1) == 5.0
    assert Pace().first_token_in(jobs=9, ahead=9_000, tokens=9_000) == 0.0, "unmeasured: no judgement"


@given(waiting=st.integers(0, 10_000), drained=st.floats(0, 1e4))
def test_callers_are_told_to_come_back_within_bounds(waiting: int, drained: float) -> None:
    assert RETRY_SECONDS[0] <= retry_after(waiting, drained) <= RETRY_SECONDS[1]


def test_a_mean_begins_evenly_and_then_follows() -> None:
    mean = Mean(weight=0.5)
    for value in (1.0, 3.0, 3.0):
        mean.add(value)

    assert mean.value == 2.5


def test_a_burst_after_silence_is_seen_after_a_handful_and_silence_at_once() -> None:
    arrivals = Arrivals()
    arrivals.add(0.0)
    assert arrivals.per_second(0.0) == 0
    for second in (60.0, 120.0, 180.0):
        arrivals.add(second)
    assert arrivals.per_second(180.0) < 1
    for number in range(10):
        arrivals.add(200.0 + number * 0.001)

    assert arrivals.per_second(200.01) > 100
    assert arrivals.per_second(202.0) < 1
