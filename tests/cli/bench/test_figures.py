"""A run is summarized with the keys of vLLM's results."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cli.bench.figures import described, detailed, most_at_once, summarize, tokens_per_second, word
from headrace.cli.bench.load import Run
from headrace.cli.bench.options import Load
from headrace.cli.bench.records import Failed, Record
from tests.cli.bench.test_latencies import record

# Of `vllm bench serve` with the default metrics and --metric-percentiles 99, as in its source in 2026.
VLLM = {
    *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts"),
    *("request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed"),
    *("total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput"),
    *("output_throughput", "total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests"),
    *(
        f"{kind}_{name}_ms"
        for kind in ("mean", "median", "std", "p99")
        for name in ("ttft", "tpot", "itl", "e2el")
    ),
}
VLLM_DETAILED = {
    *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times"),
    *("generated_texts", "errors"),
}


def run_of(*records: Record, ended: float = 10.0) -> Run:
    return Run(records=list(records), began=0.0, ended=ended, cpu=1.0)


def done(sent: float, *times: float, inputs: int | None = 10, **other: Any) -> Record:
    made = record(sent, *times)
    made.input_tokens, made.complete = inputs, True
    for name, value in other.items():
        setattr(made, name, value)
    return made


def failed(kind: str, message: str = "no") -> Record:
    made = record(0.0)
    made.fail(Failed(kind, message))
    return made


def test_all_keys_of_vllm_are_there() -> None:
    run = run_of(done(0.0, 1.0, 2.0))
    meta = described(
        Load(concurrency=3), backend="openai", model="m", prompts=1, label="", date=datetime(2026, 1, 2)
    )

    result = {**meta, **summarize(run, percents=[99])}

    assert set(result) >= VLLM
    assert set(detailed(run, ["a"])) >= VLLM_DETAILED
    assert (result["date"], result["request_rate"], result["max_concurrency"]) == (
        "20260102-000000",
        "inf",
        3,
    )
    json.dumps({**result, **detailed(run, ["a"])}, allow_nan=False)


def test_a_run_by_hand() -> None:
    run = run_of(
        done(0.0, 1.0, 1.5, 2.0),
        done(1.0, 3.0, output_tokens=1),
        failed("HTTP 503"),
        failed("HTTP 503"),
        failed("timeout"),
        Record(sent=1.0),
    )

    result = summarize(run, percents=[50, 99], goodput={"ttft": 1.5})

    assert (result["completed"], result["failed"], result["unfinished"]) == (2, 3, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (20, 4)
    assert result["request_throughput"] == pytest.approx(0.2)
    assert result["output_throughput"] == pytest.approx(0.4)
    assert result["total_token_throughput"] == pytest.approx(2.4)
    assert result["request_goodput"] == pytest.approx(0.1)
    assert result["goodput_share"] == pytest.approx(0.2), "a failed request is not good"
    assert result["error_share"] == pytest.approx(0.6)
    assert result["mean_ttft_ms"] == pytest.approx(1500)
    assert result["p99_ttft_ms"] == pytest.approx(1990)
    assert result["median_tpot_ms"] == pytest.approx(500), "an answer of one token has none"
    assert result["std_itl_ms"] == pytest.approx(0)
    assert result["p50_e2el_ms"] == pytest.approx(2000)
    assert result["errors_by_kind"] == {"HTTP 503": 2, "timeout": 1}
    assert result["output_tokens_from"] == "server and messages"
    assert "headrace" not in result
    assert "mean_client_queue_time_ms" not in result, "a closed loop has no queue"


def test_a_run_without_answers_has_no_latencies() -> None:
    result = summarize(run_of(failed("x")), percents=[99], goodput={"ttft": 1})

    assert result["mean_ttft_ms"] is None
    assert result["p99_e2el_ms"] is None
    assert (result["request_throughput"], result["goodput_share"], result["error_share"]) == (0, 0, 1)
    assert result["max_output_tokens_per_s"] == 0
    json.dumps(result, allow_nan=False)
    assert summarize(Run(), percents=[99])["error_share"] is None


def test_input_tokens_are_unknown_if_one_is() -> None:
    result = summarize(run_of(done(0.0, 1.0), done(0.0, 1.0, inputs=None)), percents=[])

    assert (result["total_input_tokens"], result["total_token_throughput"]) == (None, None)
    assert result["request_goodput"] is None


def test_with_a_rate_the_time_in_the_queue_is_a_latency() -> None:
    run = run_of(done(1.5, 3.0))
    run.records[0].planned = 1.0
    run.late.append(0.1)

    result = summarize(run, percents=[99])

    assert result["mean_client_queue_time_ms"] == pytest.approx(500)
    assert result["mean_ttft_ms"] == pytest.approx(2000), "from the planned time"
    assert result["generator"]["late_p99_ms"] == pytest.approx(100)


def test_a_busy_or_late_generator_is_reported() -> None:
    def bottleneck(cpu: float = 1.0, lag: float = 0.0, late: float = 0.0) -> bool:
        run = run_of(done(0.0, 1.0))
        run.cpu = cpu
        run.lags.extend([lag] * 10)
        run.late.extend([late] * 10)
        return bool(summarize(run, percents=[])["generator"]["bottleneck"])

    assert not bottleneck()
    assert bottleneck(cpu=9.0)
    assert bottleneck(lag=0.1)
    assert bottleneck(late=0.1)


def test_tiers_have_shares_costs_and_latencies() -> None:
    run = run_of(
        done(0.0, 1.0, tier="small", cost=0.5, largest_cost=2.0, cached_tokens=4),
        done(0.0, 3.0, tier="large", cost=2.0, largest_cost=2.0, moves=["WORKER_LOST"]),
        done(0.0, 2.0, tier="small", cost=0.25, largest_cost=1.0),
    )

    ours = summarize(run, percents=[99])["headrace"]

    assert list(ours["tiers"]) == ["large", "small"]
    small = ours["tiers"]["small"]
    assert (small["requests"], small["cost"], small["output_tokens"]) == (2, 0.75, 2)
    assert small["share"] == pytest.approx(2 / 3)
    assert small["median_ttft_ms"] == pytest.approx(1500)
    assert (ours["cost"], ours["largest_tier_cost"], ours["cached_tokens"]) == (2.75, 5.0, 4)
    assert ours["failovers"] == {"WORKER_LOST": 1}


def test_a_cost_is_known_only_if_all_are() -> None:
    ours = summarize(run_of(done(0.0, 1.0, tier="a", cost=1.0), done(0.0, 1.0, tier="a")), percents=[])[
        "headrace"
    ]

    assert ours["cost"] is None


def test_tokens_of_a_second_are_those_that_arrived_in_it() -> None:
    counted = done(0.0, 0.5, 1.5, 1.75)
    counted.counts.extend([1, 2, 3])
    told = done(0.5, 2.5, 3.5, output_tokens=10)

    assert tokens_per_second([counted, told]) == pytest.approx([1, 5, 5, 5])
    assert summarize(run_of(counted, told), percents=[])["max_output_tokens_per_s"] == 5
    assert tokens_per_second([]) == []


@given(
    spans=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10)), max_size=15),
)
def test_the_most_at_once_is_the_most_at_any_start(spans: list[tuple[int, int]]) -> None:
    records = [done(float(begin), float(begin + length)) for begin, length in spans]

    counts = [sum(other.sent <= one.sent < other.times[-1] for other in records) for one in records]
    assert most_at_once(records) == max(counts, default=0)


def test_details_are_of_each_request() -> None:
    lists = detailed(run_of(done(1.0, 2.0, 2.5), failed("timeout", "late"), Record()), ["ab", "", ""])

    assert lists["output_lens"] == [2, 0, 0]
    assert lists["ttfts"] == [1.0, 0.0, 0.0]
    assert lists["itls"] == [[0.5], [], []]
    assert lists["latencies"] == [1.5, 0.0, 0.0]
    assert lists["errors"] == ["", "timeout: late", ""]
    assert lists["generated_texts"] == ["ab", "", ""]


def test_percentiles_are_written_as_vllm_does() -> None:
    assert [word(99.0), word(99.9), word(50)] == ["99", "99.9", "50"]
