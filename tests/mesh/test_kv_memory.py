"""KV memory as callers and operators see it: prefixes are cached, and scarce memory only adds latency."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace.v1 import worker_service_pb2 as wire
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub
from headrace.worker.engine.echo import EchoEngine
from tests.harness import collect, eventually, prompt, running_mesh, running_worker

SYSTEM = "You are a helpful assistant who answers with what was asked. "


async def test_the_cached_prefix_of_a_prompt_is_reported(
    count: Callable[..., float], spans: InMemorySpanExporter
) -> None:
    before = count("headrace.prefix.tokens", source="cached")
    async with running_mesh("only", engine=lambda: EchoEngine(block_tokens=8)) as mesh:
        first = await collect(mesh.client, prompt(SYSTEM + "Who?"))
        second = await collect(mesh.client, prompt(SYSTEM + "And where was it?"))
        await eventually(lambda: not mesh.left_behind)

    assert len(SYSTEM) == 61
    assert (first.finish.usage.cached_tokens, second.finish.usage.cached_tokens) == (0, 56)
    assert second.text == SYSTEM + "And where was it?"
    assert count("headrace.prefix.tokens", source="cached") - before == 56
    prefills = [span.attributes or {} for span in spans.get_finished_spans() if span.name == "worker.prefill"]
    assert [attributes["gen_ai.usage.cache_read.input_tokens"] for attributes in prefills] == [0, 56]


async def test_the_prefix_cache_can_be_switched_off() -> None:
    async with running_mesh("only", worker_settings={"prefix_cache": False}) as mesh:
        for _ in range(2):
            answer = await collect(mesh.client, prompt(SYSTEM))
            assert answer.finish.usage.cached_tokens == 0


async def test_a_resumed_answer_counts_only_prompt_tokens_as_cached() -> None:
    async with running_mesh("only", engine=lambda: EchoEngine(block_tokens=8)) as mesh:
        whole = await collect(mesh.client, prompt("0123456789", max_tokens=40, ignore_eos=True))
        request = prompt("0123456789", max_tokens=40, ignore_eos=True)
        request.resume.token_ids.extend(whole.ids[:30])
        request.sampling.seed = whole.accepted.seed
        rest = await collect(mesh.client, request)

    assert whole.ids[30:] == rest.ids
    assert rest.finish.usage.cached_tokens == 10, (
        "the answer's tokens were cached, too, but are not prompt tokens"
    )


async def test_answers_are_whole_though_memory_holds_little_more_than_one(
    count: Callable[..., float],
) -> None:
    preempted = count("headrace.sequences.preempted")
    texts = [f"{number} is a number and this is a text about it" for number in range(8)]
    async with running_mesh(
        "only",
        engine=lambda: EchoEngine(  # slow enough for all eight to run at once
            max_running=8, context_length=128, block_tokens=4, kv_blocks=36, step_seconds=0.01
        ),
    ) as mesh:
        answers = await asyncio.gather(
            *(collect(mesh.client, prompt(text, max_tokens=70, ignore_eos=True)) for text in texts)
        )
        await eventually(lambda: not mesh.left_behind)

    for text, answer in zip(texts, answers, strict=True):
        assert answer.text == (text * 3)[:70]
    assert count("headrace.sequences.preempted") > preempted
    assert count("headrace.kv.usage") == 0


async def test_a_worker_reports_its_memory_in_tokens() -> None:
    engine = EchoEngine(max_running=8, context_length=128, block_tokens=4, kv_blocks=36)
    async with (
        running_worker(engine) as worker,
        grpc.aio.insecure_channel(f"127.0.0.1:{worker.server.port}") as channel,
    ):
        model = (await WorkerServiceStub(channel).GetModel(wire.GetModelRequest())).model
        load = worker.streams.load()

    assert model.kv_tokens == load.kv_tokens_total == load.kv_tokens_free == 4 * 36
