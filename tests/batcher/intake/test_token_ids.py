"""A prompt of token ids is continued as it is, and waits for no tokenizer."""

from __future__ import annotations

import json

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace import errors
from headrace.batcher.text.recorded_text import MAX_IDS
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import VOCABULARY_SIZE, EchoEngine
from tests.batcher.intake.test_intake import GatedTokenizer, block_threads, gated, results
from tests.harness import collect, eventually, running_mesh
from tests.tier import running_tier


def ids(*tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=tokens))


async def test_token_ids_are_continued_as_they_are_and_resumed() -> None:
    async with running_tier([EchoEngine()]) as tier:
        answer = await collect(tier.client, ids(*b"Hello"))
        rest = ids(*b"Hello")
        rest.resume.token_ids.extend(b"He")
        rest.sampling.seed = 1
        resumed = await collect(tier.client, rest)

    assert (answer.text, answer.accepted.prompt_tokens) == ("Hello", 5)
    assert resumed.text == "llo"


@pytest.mark.parametrize(
    ("tokens", "error", "field"),
    [
        ([], errors.EmptyInput, "token_ids.ids"),
        ([1, VOCABULARY_SIZE, 2], errors.InvalidRequest, "token_ids.ids"),
        ([2**32 - 1], errors.InvalidRequest, "token_ids.ids"),
        ([1] * 4096, errors.ContextTooLong, "input"),
        ([2**32 - 1] * 5000, errors.ContextTooLong, "input"),
        ([1] * 1_048_577, errors.InvalidRequest, "token_ids.ids"),
    ],
)
async def test_ids_that_the_model_cannot_continue_are_rejected(
    tokens: list[int], error: type[errors.HeadraceError], field: str
) -> None:
    async with running_tier([EchoEngine(context_length=4096)]) as tier:
        with pytest.raises(error) as caught:
            await collect(tier.client, ids(*tokens))
        assert (await collect(tier.client, ids(*b"ok"))).text == "ok"

    assert type(caught.value) is error
    assert caught.value.field == field


async def test_token_ids_do_not_wait_for_the_tokenizer() -> None:
    tokenizer = GatedTokenizer()
    async with gated(tokenizer) as tier:
        blocked = await block_threads(tier, tokenizer)
        answer = await collect(tier.client, ids(*b"at once"))
        assert not any(task.done() for task in blocked)
        tokenizer.open()
        await results(blocked)

    assert answer.text == "at once"


async def test_a_span_has_the_last_ids_of_a_prompt_if_it_is_asked_for(spans: InMemorySpanExporter) -> None:
    async with running_mesh("only", batcher_settings={"trace_content": True}) as mesh:
        await collect(mesh.client, ids(*([1] * MAX_IDS), 72, 105))
        await eventually(lambda: not mesh.left_behind)

    (recorded,) = [
        dict(span.attributes or {})
        for span in spans.get_finished_spans()
        if "gen_ai.input.messages" in (span.attributes or {})
    ]
    assert recorded["gen_ai.operation.name"] == "text_completion"
    ((part,),) = [message["parts"] for message in json.loads(str(recorded["gen_ai.input.messages"]))]
    assert (part["type"], part["count"], part["ids"][-2:]) == ("token_ids", MAX_IDS + 2, [72, 105])
    assert len(part["ids"]) == MAX_IDS
