"""Latencies and their statistics are those of vLLM."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cli.bench.latencies import gaps, percentile, spread, time_per_output_token
from headrace.cli.bench.records import EMPTY, Failed, Record

VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


def record(sent: float, *times: float, planned: float | None = None) -> Record:
    made = Record(planned=sent if planned is None else planned, sent=sent)
    made.times.extend(times)
    return made


def test_latencies_of_an_answer_count_from_the_planned_time() -> None:
    one = record(10.25, 10.5, 10.6, 11.0, planned=10.0)
    one.counts.extend([1, 1, 3])

    assert one.ttft == pytest.approx(0.5)
    assert one.e2el == pytest.approx(1.0)
    assert one.queue_time == pytest.approx(0.25)
    assert one.tokens == 5
    assert one.tpot == pytest.approx(0.5 / 4), "over the tokens after the first"
    assert one.gaps == pytest.approx([0.1, 0.4]), "a message with several tokens counts once"


def test_the_servers_count_of_tokens_counts() -> None:
    one = record(0.0, 1.0, 2.0)
    assert one.tokens == 2, "one for each message, as far as known"

    one.output_tokens = 11

    assert one.tokens == 11
    assert one.tpot == pytest.approx(0.1)


def test_one_token_has_no_time_per_token() -> None:
    assert time_per_output_token(0.5, 0.5, 1) is None
    assert record(0.0, 1.0).tpot is None
    assert record(0.0, 1.0).gaps == []


def test_an_answer_without_tokens_is_a_failure() -> None:
    with pytest.raises(Failed) as raised:
        record(0.0).succeed()

    assert raised.value.kind == EMPTY


@given(values=VALUES, percent=st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(numpy.percentile(values, percent)))


@given(values=VALUES)
def test_a_spread_is_within_its_values(values: list[float]) -> None:
    found = spread(values, [0, 50, 90, 100])

    assert found is not None
    assert found.percentiles[0] == min(values)
    assert found.percentiles[100] == max(values)
    assert found.percentiles[50] == pytest.approx(found.median)
    assert list(found.percentiles.values()) == sorted(found.percentiles.values())
    assert min(values) - 1e-6 <= found.mean <= max(values) + 1e-6


def test_a_spread_by_hand() -> None:
    found = spread([1.0, 2.0, 3.0, 6.0], [75])

    assert found is not None
    assert (found.mean, found.median) == (3.0, 2.5)
    assert found.std == pytest.approx(3.5**0.5), "of the population"
    assert found.percentiles == {75: 3.75}
    assert spread([], [99]) is None


@given(times=st.lists(st.floats(0, 1e5), max_size=30).map(sorted))
def test_gaps_add_up_to_the_time_between_the_ends(times: list[float]) -> None:
    found = gaps(times)

    assert len(found) == max(len(times) - 1, 0)
    assert sum(found) == pytest.approx(times[-1] - times[0] if times else 0.0, abs=1e-6)
