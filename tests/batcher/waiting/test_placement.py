"""A job is placed where it is computed soonest: by backlog, prefill rate and cached prefixes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from headrace.batcher.waiting.estimates import RETRY_SECONDS, ArrivalRate, Estimates, RunningMean, retry_after
from headrace.batcher.waiting.placement import WorkerCandidate, choose
from headrace.batcher.waiting.prefixes import BLOCK, PrefixIndex, block_names

IDLE = WorkerCandidate(name="a", free_slots=8, sequences=0, backlog=0, budget=1000, prefill_rate=100.0)
CANDIDATES = st.lists(
    st.builds(
        WorkerCandidate,
        name=st.sampled_from("abcdef"),
        free_slots=st.integers(1, 9),
        sequences=st.integers(0, 9),
        backlog=st.integers(0, 3000),
        budget=st.integers(1, 3000),
        prefill_rate=st.floats(0, 1000),
        cached=st.integers(0, 100),
        probation=st.booleans(),
    ),
    unique_by=lambda candidate: candidate.name,
)


@given(candidates=CANDIDATES, tokens=st.integers(1, 3000), avoid=st.sampled_from("abc"))
def test_the_chosen_worker_accepts_the_job_and_is_the_avoided_one_only_if_alone(
    candidates: list[WorkerCandidate], tokens: int, avoid: str
) -> None:
    chosen = choose(candidates, tokens, avoid=avoid, probation=True)
    able = [one for one in candidates if one.accepts(tokens) and not one.probation]

    assert (chosen is None) == (not able)
    if chosen is not None:
        assert chosen in able
        assert chosen.name != avoid or all(one.name == avoid for one in able)


def test_a_smaller_backlog_a_higher_rate_or_a_cached_prefix_wins() -> None:
    other = replace(IDLE, name="b")
    assert choose([replace(IDLE, backlog=500), other], 100) == other
    assert choose([replace(IDLE, sequences=3), other], 100) == other
    faster = replace(other, prefill_rate=200.0)
    assert choose([IDLE, faster], 100) == faster
    holder = replace(other, cached=96, sequences=1)
    assert choose([IDLE, holder], 100) == holder


def test_an_idle_worker_accepts_any_prompt_and_a_busy_one_only_within_its_budget() -> None:
    assert IDLE.accepts(100_000)
    assert not replace(IDLE, backlog=900).accepts(200)
    assert replace(IDLE, backlog=900, cached=150).accepts(200)


def test_the_backlog_of_other_batchers_excludes_no_worker() -> None:
    assert replace(IDLE, backlog=5000, others_backlog=5000).accepts(200)
    assert not replace(IDLE, backlog=5001, others_backlog=5000).accepts(200), (
        "one prompt of this batcher at a time"
    )


@given(common=st.lists(st.integers(0, 999), max_size=200), tail=st.lists(st.integers(0, 999), max_size=70))
def test_prompts_share_exactly_the_blocks_of_their_common_prefix(common: list[int], tail: list[int]) -> None:
    one, two = block_names([*common, 1000, *tail]), block_names([*common, 1001, *tail])
    shared = sum(left == right for left, right in zip(one, two, strict=True))

    assert shared == len(common) // BLOCK


def test_the_blocks_of_a_worker_are_tracked_until_its_cache_is_lost() -> None:
    prefixes = PrefixIndex()
    names = block_names(range(BLOCK * 4 + 1))
    prefixes.expect(names[:2], "a")
    prefixes.expect(names, "b")

    assert prefixes.cached_tokens(names, "a") == 2 * BLOCK
    assert prefixes.cached_tokens(names, "b") == 4 * BLOCK
    prefixes.forget("b")
    assert (prefixes.cached_tokens(names, "a"), prefixes.cached_tokens(names, "b")) == (2 * BLOCK, 0)


GRAIN = 16


def test_a_worker_that_evicted_a_prompt_has_evicted_all_that_it_used_before() -> None:
    prefixes = PrefixIndex()
    old, lost, new = (block_names([first] * (BLOCK * 3 + 1)) for first in (1, 2, 3))
    for names in (old, lost, new):
        prefixes.expect(names, "a")
        prefixes.record_prefill(names, "a", 0, GRAIN)
    prefixes.expect(new, "b")
    assert [prefixes.cached_tokens(names, "a") for names in (old, lost, new)] == [3 * BLOCK] * 3

    prefixes.expect(lost, "a")
    prefixes.record_prefill(lost, "a", BLOCK, GRAIN)

    assert prefixes.cached_tokens(old, "a") == 0
    assert prefixes.cached_tokens(lost, "a") == 3 * BLOCK, "it was computed again just now"
    assert prefixes.cached_tokens(new, "a") == 3 * BLOCK, "it was used later"
    assert prefixes.cached_tokens(new, "b") == 3 * BLOCK


def test_a_worker_that_confirms_the_estimate_keeps_its_blocks() -> None:
    prefixes = PrefixIndex()
    old, names = block_names([1] * (BLOCK * 3 + 1)), block_names([2] * (BLOCK * 3 + 1))
    for one in (old, names):
        prefixes.expect(one, "a")
        prefixes.record_prefill(one, "a", 0, 64)
    prefixes.record_prefill(names, "a", 64, 64)  # 64 of 96 tokens, the most in blocks of 64

    assert prefixes.cached_tokens(old, "a") == 3 * BLOCK


def test_a_prompt_that_was_sent_but_not_computed_implies_no_eviction() -> None:
    prefixes = PrefixIndex()
    held, sent = block_names([1] * (BLOCK * 3 + 1)), block_names([2] * (BLOCK * 3 + 1))
    prefixes.expect(held, "a")
    prefixes.record_prefill(held, "a", 0, GRAIN)
    prefixes.expect(sent, "a")  # and its caller left
    prefixes.record_prefill(sent, "a", 0, GRAIN)

    assert prefixes.cached_tokens(held, "a") == 3 * BLOCK


@given(prompts=st.lists(st.lists(st.integers(0, 3), min_size=40, max_size=200), max_size=20))
def test_the_prefix_index_is_bounded(prompts: list[list[int]]) -> None:
    prefixes = PrefixIndex(limit=5)
    for ids in prompts:
        prefixes.expect(block_names(ids), "a")
        assert len(prefixes) <= 5


def test_the_time_to_first_token_covers_the_work_ahead() -> None:
    pace = Estimates(prefill_rate=100.0, step_seconds=0.05, backlog=50)

    assert pace.first_token_seconds(jobs=1, ahead=30, tokens=20) == 1.0
    assert pace.decode_seconds(21) == 1.0
    assert Estimates(drain_rate=2.0).first_token_seconds(jobs=9, ahead=0, tokens=1) == 5.0
    assert Estimates().first_token_seconds(jobs=9, ahead=9_000, tokens=9_000) == 0.0, (
        "without measurements there is no estimate"
    )


@given(waiting=st.integers(0, 10_000), drained=st.floats(0, 1e4))
def test_retry_delays_are_within_bounds(waiting: int, drained: float) -> None:
    assert RETRY_SECONDS[0] <= retry_after(waiting, drained) <= RETRY_SECONDS[1]


def test_a_running_mean_weights_the_first_values_equally() -> None:
    mean = RunningMean(weight=0.5)
    for value in (1.0, 3.0, 3.0):
        mean.add(value)

    assert mean.value == 2.5


def test_the_arrival_rate_detects_a_burst_after_a_handful_and_silence_immediately() -> None:
    arrivals = ArrivalRate()
    arrivals.add(0.0)
    assert arrivals.per_second(0.0) == 0
    for second in (60.0, 120.0, 180.0):
        arrivals.add(second)
    assert arrivals.per_second(180.0) < 1
    for number in range(10):
        arrivals.add(200.0 + number * 0.001)

    assert arrivals.per_second(200.01) > 100
    assert arrivals.per_second(202.0) < 1
