"""The arithmetic of a run."""

from __future__ import annotations

import pytest

from benchmarks.serving.figures import Answer, Spread, WrongLength, check, figures, spread


def test_a_run_is_summarized_in_rates_and_milliseconds() -> None:
    first = Answer(0, wanted=4, sent=10.0, arrivals=[(10.5, 1), (10.6, 1), (10.9, 2)])
    second = Answer(1, wanted=1, sent=10.0, arrivals=[(11.0, 1)])

    run = figures([first, second], seconds=2.0)

    assert run["output_tokens"] == 5
    assert run["output_tokens_per_s"] == 2.5
    assert run["requests_per_s"] == 1.0
    assert run["ttft_p50_ms"] == pytest.approx(750)
    assert run["tpot_p50_ms"] == pytest.approx(400 / 3), "an answer of one token has no time per token"
    assert run["itl_mean_ms"] == pytest.approx(200), "gaps are between messages"
    assert run["e2el_p99_ms"] == pytest.approx(900 + 0.99 * 100)


def test_answers_of_one_token_have_no_gaps() -> None:
    run = figures([Answer(0, wanted=1, sent=0.0, arrivals=[(0.5, 1)])], seconds=1.0)

    assert "itl_p50_ms" not in run
    assert "tpot_p50_ms" not in run


@pytest.mark.parametrize("came", [3, 5])
def test_an_answer_of_another_length_invalidates_the_run(came: int) -> None:
    with pytest.raises(WrongLength, match=f"request 7 asked for 4 tokens and got {came}"):
        check([Answer(7, wanted=4, sent=0.0, arrivals=[(1.0, came)])])


def test_repetitions_give_median_and_range() -> None:
    runs = [{"a": 3.0}, {"a": 1.0}, {"a": 10.0}, {"b": 1.0}]

    assert spread(runs, "a") == Spread(median=3.0, low=1.0, high=10.0)
    assert spread(runs, "c") is None
