"""Summarize a run with the names and definitions of `vllm bench serve`, and add what its JSON does not have.

Counts and latencies are of the requests that were completed. Times are in milliseconds where the name ends in
`_ms`, else in seconds. A figure without a value, such as a latency if no request was completed, is None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headrace.cli.bench.latencies import spread
from headrace.cli.bench.objectives import is_good

if TYPE_CHECKING:
    from headrace.cli.bench.load import Run
    from headrace.cli.bench.options import Load
    from headrace.cli.bench.records import Record

LATENCIES = ("ttft", "tpot", "itl", "e2el")
QUEUE = "client_queue_time"

# The figures that an objective can name, besides percentiles.
NAMED = (
    *(
        "completed",
        "failed",
        "duration",
        "request_throughput",
        "request_goodput",
        "goodput_share",
        "error_share",
    ),
    *("output_throughput", "total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests"),
    *(f"{kind}_{name}_ms" for name in LATENCIES for kind in ("mean", "median", "std")),
)

# Above these, a share of a core and seconds, the result is about the generator as much as about the server.
BUSY_SHARE, BUSY_LAG = 0.85, 0.02


def summarize(
    run: Run, *, percents: Sequence[float], goodput: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return the figures of a run.

    percents   percentiles of each latency
    goodput    limits of `objectives.is_good`; empty or None: no goodput
    """
    completed = [record for record in run.records if record.complete]
    failed = [record for record in run.records if record.error]
    seconds = max(run.ended - run.began, 1e-9)
    good = sum(is_good(record, goodput) for record in completed) if goodput else None
    known = [record.input_tokens for record in completed if record.input_tokens is not None]
    inputs = sum(known) if len(known) == len(completed) else None
    outputs = sum(record.tokens for record in completed)
    ended = len(completed) + len(failed)
    figures: dict[str, Any] = {
        "duration": seconds,
        "completed": len(completed),
        "failed": len(failed),
        "unfinished": len(run.records) - ended,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(completed) / seconds,
        "request_goodput": None if good is None else good / seconds,
        "goodput_share": None if good is None or not ended else good / ended,
        "error_share": len(failed) / ended if ended else None,
        "output_throughput": outputs / seconds,
        "total_token_throughput": None if inputs is None else (inputs + outputs) / seconds,
        "max_output_tokens_per_s": max(tokens_per_second(completed), default=0.0),
        "max_concurrent_requests": most_at_once(completed),
        "output_tokens_from": _counted_by(completed),
    }
    latencies: dict[str, list[float]] = {
        "ttft": [record.ttft for record in completed],
        "tpot": [tpot for record in completed if (tpot := record.tpot) is not None],
        "itl": [gap for record in completed for gap in record.gaps],
        "e2el": [record.e2el for record in completed],
    }
    if run.late:
        latencies[QUEUE] = [record.queue_time for record in completed]
    for name, values in latencies.items():
        figures |= _latency(name, values, percents)
    figures["errors_by_kind"] = dict(Counter(record.error for record in failed).most_common())
    figures["generator"] = generator(run)
    if ours := headrace_figures(completed, percents):
        figures["headrace"] = ours
    return figures


def _latency(name: str, values: Sequence[float], percents: Sequence[float]) -> dict[str, float | None]:
    found = spread(values, percents)
    if found is None:
        kinds = ("mean", "median", "std", *(f"p{word(percent)}" for percent in percents))
        return {f"{kind}_{name}_ms": None for kind in kinds}
    named = {"mean": found.mean, "median": found.median, "std": found.std}
    named |= {f"p{word(percent)}": value for percent, value in found.percentiles.items()}
    return {f"{kind}_{name}_ms": value * 1e3 for kind, value in named.items()}


def word(percent: float) -> str:
    """Return a percentile as vLLM writes it: "99", "99.9"."""
    return str(int(percent)) if percent == int(percent) else str(percent)


def _counted_by(completed: Sequence[Record]) -> str:
    """Return how tokens of answers were counted: by the server, or as one for each message with text."""
    unknown = sum(record.output_tokens is None for record in completed)
    if not unknown:
        return "server"
    return "messages" if unknown == len(completed) else "server and messages"


def tokens_per_second(completed: Sequence[Record]) -> list[float]:
    """Return the tokens that arrived in each second since the first request was sent.

    If only the sum of an answer is known, its tokens are spread evenly over its messages.
    """
    if not completed:
        return []
    began = min(record.sent for record in completed)
    times = np.concatenate([np.asarray(record.times) for record in completed]) - began
    weights = np.concatenate([_weights(record) for record in completed])
    return [float(tokens) for tokens in np.bincount(np.maximum(times, 0.0).astype(int), weights=weights)]


def _weights(record: Record) -> NDArray[np.float64]:
    if record.counts:
        return np.asarray(record.counts, dtype=float)
    return np.full(len(record.times), record.tokens / len(record.times))


def most_at_once(completed: Sequence[Record]) -> int:
    """Return the largest number of these requests that were in flight at one time."""
    # An end comes before a start at the same time.
    events = sorted(
        [(record.sent, 1) for record in completed] + [(record.times[-1], -1) for record in completed]
    )
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


def generator(run: Run) -> dict[str, Any]:
    """Return how busy and how late this process was.

    cpu_share       of one core; the load generator computes on one
    lag_p99_ms      how late it ran, every 10 ms
    late_p99_ms     how late it started requests at planned times; None in a closed loop
    bottleneck      whether it was so busy or late that the result is not about the server alone
    """
    share = run.cpu / max(run.ended - run.began, 1e-9)
    lag = float(np.percentile(run.lags, 99)) if run.lags else 0.0
    late = float(np.percentile(run.late, 99)) if run.late else None
    return {
        "cpu_share": share,
        "lag_p99_ms": lag * 1e3,
        "late_p99_ms": None if late is None else late * 1e3,
        "bottleneck": share > BUSY_SHARE or lag > BUSY_LAG or (late or 0.0) > BUSY_LAG,
    }


def headrace_figures(completed: Sequence[Record], percents: Sequence[float]) -> dict[str, Any]:
    """Return what only Headrace reports: tiers, cost, cached tokens, failovers. Empty for other servers."""
    tiers: dict[str, list[Record]] = {}
    for record in completed:
        if record.tier:
            tiers.setdefault(record.tier, []).append(record)
    if not tiers:
        return {}
    return {
        "tiers": {
            tier: {
                "requests": len(own),
                "share": len(own) / len(completed),
                "output_tokens": sum(record.tokens for record in own),
                "cost": _sum([record.cost for record in own]),
                **_latency("ttft", [record.ttft for record in own], percents),
                **_latency("tpot", [tpot for record in own if (tpot := record.tpot) is not None], percents),
            }
            for tier, own in sorted(tiers.items())
        },
        "cost": _sum([record.cost for record in completed]),
        "largest_tier_cost": _sum([record.largest_cost for record in completed]),
        "cached_tokens": sum(record.cached_tokens or 0 for record in completed),
        "failovers": dict(Counter(reason for record in completed for reason in record.moves)),
    }


def _sum(costs: Sequence[float | None]) -> float | None:
    known = [cost for cost in costs if cost is not None]
    return math.fsum(known) if known and len(known) == len(costs) else None


def described(
    load: Load, *, backend: str, model: str, prompts: int, label: str, date: datetime
) -> dict[str, Any]:
    """Return what was measured, as vLLM's results name it.

    prompts   requests that were to be sent
    """
    return {
        "date": date.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend,
        "backend": backend,
        "label": label or backend,
        "model_id": model,
        "tokenizer_id": None,  # the server counts tokens
        "num_prompts": prompts,
        "request_rate": "inf" if load.rate is None else load.rate,
        "burstiness": load.burstiness if math.isfinite(load.burstiness) else "inf",
        "max_concurrency": load.max_concurrency if load.concurrency is None else load.concurrency,
        "seed": load.seed,
        "latencies_from": "sent" if load.rate is None else "planned",
    }


def detailed(run: Run, texts: Sequence[str]) -> dict[str, Any]:
    """Return the lists of `--save-detailed`: one entry per request, in the order of starts."""
    records = run.records
    return {
        "input_lens": [record.input_tokens for record in records],
        "output_lens": [record.tokens if record.complete else 0 for record in records],
        "ttfts": [record.ttft if record.times else 0.0 for record in records],
        "itls": [record.gaps for record in records],
        "latencies": [record.e2el if record.times else 0.0 for record in records],
        "start_times": [record.sent for record in records],
        "queue_times": [record.queue_time if record.sent else 0.0 for record in records],
        "generated_texts": list(texts),
        "errors": [f"{record.error}: {record.message}" if record.error else "" for record in records],
        "tiers": [record.tier for record in records],
    }
