"""Traces, metrics and logs of a worker with vLLM are those of any worker."""

from __future__ import annotations

import json
from collections.abc import Sequence

from headrace.cli.demo.otlp_receiver import Span
from headrace.client import Client, chat
from tests.harness import PATIENCE, collect
from tests.scraping import scrape
from tests.vllm.conftest import TIER, Served


async def test_one_trace_shows_a_request_in_router_batcher_and_worker(client: Client, served: Served) -> None:
    answer = await collect(client, chat("Count to five.", temperature=0, max_tokens=20))

    def ours(spans: Sequence[Span]) -> list[Span]:
        entries = [
            span
            for span in spans
            if span.service == "headrace-router"
            and span.attributes.get("headrace.request.id") == answer.accepted.request_id
        ]
        return [span for span in spans if entries and span.trace_id == entries[0].trace_id]

    await served.spans.wait_for(
        lambda spans: {"router.score", "batcher.queue", "worker.decode"} <= {one.name for one in ours(spans)},
        timeout=PATIENCE,
    )
    found = ours(served.spans.spans)
    by_name = {span.name: span for span in found}
    prefill, decode = by_name["worker.prefill"], by_name["worker.decode"]
    usage = answer.finish.usage

    assert {span.service for span in found} >= {"headrace-router", "headrace-batcher", "headrace-worker"}
    assert prefill.attributes["gen_ai.usage.input_tokens"] == usage.prompt_tokens
    assert decode.attributes["gen_ai.usage.output_tokens"] == usage.completion_tokens
    assert decode.attributes["headrace.outcome"] in ("stop", "length")
    assert prefill.parent_id == decode.parent_id
    assert prefill.start <= prefill.end == decode.start < decode.end


async def test_the_metrics_of_the_engine_count_its_tokens_steps_and_memory(
    client: Client, served: Served
) -> None:
    labels = {"headrace_tier": TIER}
    before = scrape(served.metrics_port)
    answer = await collect(client, chat("Tell me about water mills.", temperature=0, max_tokens=20))
    await served.fleet.quiet()
    after = scrape(served.metrics_port)

    def grown(name: str, **more: str) -> float:
        return after.value(name, **labels, **more) - before.value(name, **labels, **more)

    assert grown("headrace_tokens_generated_total") == answer.tokens
    assert grown("headrace_step_duration_seconds_count") >= answer.tokens
    assert grown("headrace_sequences_ended_total", headrace_outcome="ok") == 1
    assert after.value("headrace_kv_capacity", **labels) > 0
    assert 0 <= after.value("headrace_kv_usage_ratio", **labels) <= 1


async def test_the_lines_of_vllm_are_json_among_those_of_the_worker(served: Served) -> None:
    """Only what native code, progress bars and the import of a new process print is plain text."""
    written = served.worker.log.read_text().splitlines()
    lines = [json.loads(line) for line in written if line.startswith("{")]
    plain = [line for line in written if not line.startswith("{")]

    loggers = {line["logger"] for line in lines}
    assert {line["service"] for line in lines} == {"worker"}
    assert "headrace.worker" in loggers
    assert any(logger.startswith("vllm") for logger in loggers)
    assert not [line for line in lines if line["level"] in ("ERROR", "CRITICAL")]
    assert not [line for line in plain if "Traceback" in line or "ERROR" in line]
