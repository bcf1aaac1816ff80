"""Limits and objectives are parsed strictly, and judged as they say."""

from __future__ import annotations

import pytest

from headrace.cli.bench.figures import NAMED
from headrace.cli.bench.objectives import (
    Objective,
    is_good,
    parse_goodput,
    parse_objective,
    parse_percentiles,
    percent_of,
)
from headrace.cli.bench.options import BadOption
from tests.cli.bench.test_latencies import record


@pytest.mark.parametrize(
    ("text", "value", "met"),
    [
        ("p99_ttft_ms<=500", 500.0, True),
        ("p99_ttft_ms<500", 500.0, False),
        ("output_throughput >= 100", 100.0, True),
        ("output_throughput>100", 100.0, False),
        ("failed<=0", 1.0, False),
        ("p99.9_itl_ms<=1e3", None, False),
    ],
)
def test_an_objective_is_met_or_not(text: str, value: float | None, met: bool) -> None:
    objective = parse_objective(text, NAMED)

    assert objective.met({objective.name: value}) is met


def test_a_figure_that_was_not_measured_does_not_meet_an_objective() -> None:
    assert not Objective("failed", ">=", 0).met({})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p99_tft_ms<=3", "did you mean p99_ttft_ms"),
        ("ttft<=3", "no figure 'ttft'"),
        ("p101_ttft_ms<=3", "no figure"),
        ("p99.0_ttft_ms<=3", "did you mean .*p99_ttft_ms"),  # no result has this name
        ("p099_ttft_ms<=3", "no figure"),
        ("p99_ttft_ms", "must be a figure"),
        ("p99_ttft_ms<=fast", "must be a figure"),
        ("p99_ttft_ms<=nan", "must be a figure"),
        ("p99_ttft_ms=3", "must be a figure"),
        ("", "must be a figure"),
    ],
)
def test_a_bad_objective_is_explained(text: str, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        parse_objective(text, NAMED)


def test_percentiles_are_those_asked_for_and_those_of_objectives() -> None:
    objective = parse_objective("p99.9_e2el_ms<=3", NAMED)

    assert parse_percentiles("95, 50,95", [objective]) == [50, 95, 99.9]
    assert percent_of("p99.9_e2el_ms") == 99.9
    assert percent_of("mean_e2el_ms") is None


@pytest.mark.parametrize("text", ["", "101", "-1", "p99", "50,,99", "nan"])
def test_bad_percentiles_are_explained(text: str) -> None:
    with pytest.raises(BadOption, match="numbers from 0 to 100"):
        parse_percentiles(text)


def test_goodput_limits_are_milliseconds_of_a_latency() -> None:
    assert parse_goodput("ttft:500, tpot:50 e2el:3000") == {"ttft": 0.5, "tpot": 0.05, "e2el": 3.0}
    assert parse_goodput("") == {}


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:-1", "itl:5", "ttft=5", "ttft:inf"])
def test_bad_goodput_limits_are_explained(text: str) -> None:
    with pytest.raises(BadOption, match="must be limits in ms for ttft, tpot, e2el"):
        parse_goodput(text)


def test_a_good_request_keeps_all_limits() -> None:
    one = record(0.0, 0.5, 0.7, 0.9)

    assert is_good(one, {"ttft": 0.5, "tpot": 0.21, "e2el": 0.9})
    assert not is_good(one, {"ttft": 0.4, "tpot": 0.3, "e2el": 2.0})
    assert not is_good(one, {"tpot": 0.19})
    assert not is_good(one, {"e2el": 0.8})
    assert is_good(record(0.0, 0.5), {"tpot": 0.0}), "one token takes no time per token, as in vLLM"
