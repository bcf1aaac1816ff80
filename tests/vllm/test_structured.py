"""Structured answers at vLLM beyond their form: resumed, with penalties, and with log-probabilities."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import pytest

from headrace.client import Client, chat
from headrace.v1 import generation_pb2 as pb
from tests.harness import Answer, collect

TIMEOUT = 600.0
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "born"],
    "additionalProperties": False,
}


def request(resumed: list[int] | None = None, **sampling: Any) -> pb.GenerateRequest:
    made = chat("Invent a person.", **{"max_tokens": 80, "seed": 3, **sampling})
    made.sampling.json_schema = json.dumps(PERSON)
    made.stream.include_token_ids = True
    if resumed:
        made.resume.token_ids.extend(resumed)
        made.resume.attempt = 1
    return made


async def ask(client: Client, asked: pb.GenerateRequest) -> Answer:
    return await collect(client, asked, timeout=TIMEOUT)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.2, "top_p": 0.95},
        {"temperature": 0.0, "presence_penalty": 1.0, "repetition_penalty": 1.2},
    ],
    ids=str,
)
async def test_a_structured_answer_is_resumed_anywhere(client: Client, sampling: dict[str, Any]) -> None:
    """The grammar continues after the tokens that were delivered, and so does the noise."""
    whole = await ask(client, request(**sampling))
    cuts = (1, len(whole.ids) // 2, len(whole.ids) - 1)

    rests = await asyncio.gather(*(ask(client, request(whole.ids[:cut], **sampling)) for cut in cuts))

    assert whole.finish.reason == pb.FINISH_REASON_STOP
    jsonschema.validate(json.loads(whole.text), PERSON)
    assert [rest.ids for rest in rests] == [whole.ids[cut:] for cut in cuts]


async def test_many_structured_answers_keep_their_forms_in_one_batch(client: Client) -> None:
    answers = await asyncio.gather(*(ask(client, request(temperature=1.0, seed=seed)) for seed in range(12)))

    for answer in answers:
        assert answer.finish.reason == pb.FINISH_REASON_STOP
        jsonschema.validate(json.loads(answer.text), PERSON)
    assert len({answer.text for answer in answers}) > 1


async def test_log_probabilities_are_those_before_the_form_was_applied(client: Client) -> None:
    """So the most likely token of a place may be one that the form excludes."""
    answer = await ask(client, request(temperature=0.0, top_logprobs=2))

    excluded = [place for place in answer.details if place.token.id not in {top.id for top in place.top}]
    assert excluded, "at some places the form excludes the most likely tokens"
