"""Forms of answers that are made to do harm end in a typed error or a valid answer, and hurt nobody else."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, Answer, collect, eventually
from tests.hostile.conftest import SEED
from tests.tier import Tier, running_tier

MEMORY = 1 << 30  # of the process that checks grammars


def _schema(schema: dict[str, Any]) -> pb.Sampling:
    return pb.Sampling(json_schema=json.dumps(schema))


def _nested(depth: int) -> pb.Sampling:
    return pb.Sampling(json_schema='{"items":' * depth + "{}" + "}" * depth)


def _slow() -> pb.Sampling:
    return _schema({"patternProperties": {f"^p{number}x": {"type": "null"} for number in range(400)}})


def _crossed() -> pb.Sampling:
    def one(name: int, value: int) -> dict[str, Any]:
        return {"type": "object", "properties": {f"p{name}": {"const": value}}}

    return _schema({"allOf": [{"anyOf": [one(i, j) for j in range(4)]} for i in range(12)]})


def _rules(count: int) -> pb.Sampling:
    chain = "\n".join(f"r{number}: r{number + 1}" for number in range(count))
    return pb.Sampling(lark=f'start: r0\n{chain}\nr{count}: "a"')


FORMS: dict[str, Callable[[], pb.Sampling]] = {
    "huge enum": lambda: _schema({"enum": [f"v{number}" for number in range(6000)]}),
    "many choices": lambda: pb.Sampling(choices=pb.Choices(texts=[f"{n:04d}" * 250 for n in range(1024)])),
    "exponential regex": lambda: pb.Sampling(regex="((a{1,1000}){1,1000}){1,1000}"),
    "regex with many states": lambda: pb.Sampling(regex="(a|b)*a(a|b){1000}"),
    "regex with classes": lambda: pb.Sampling(regex=r"(\w|\d|[^x])*" * 200),
    "nested 50 times": lambda: _nested(50),
    "nested 5,000 times": lambda: _nested(5000),
    "recursive reference": lambda: _schema({"$ref": "#"}),
    "recursive value": lambda: _schema({"type": "object", "properties": {"a": {"$ref": "#"}}}),
    "chain of references": lambda: _schema(
        {"$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(1500)}, "$ref": "#/$defs/d0"}
    ),
    "doubling references": lambda: _schema(
        {
            "$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}
            | {"d40": {}},
            "$ref": "#/$defs/d0",
        }
    ),
    "giant maxLength": lambda: _schema({"type": "string", "minLength": 10**9, "maxLength": 10**12}),
    "giant minItems": lambda: _schema({"type": "array", "minItems": 10**9, "items": {"type": "integer"}}),
    "giant numbers": lambda: _schema({"type": "number", "minimum": -1e300, "maximum": 1e300}),
    "slow patterns": _slow,
    "crossed alternatives": _crossed,
    "crash in a range": lambda: pb.Sampling(lark='start: %json {"const": -9223372036854775807}'),
    "crash in a chain": lambda: _rules(3500),
    "long chain": lambda: _rules(300),
    "ambiguous rules": lambda: pb.Sampling(lark='start: start start | "a" | "aa" |'),
    "repeated rules": lambda: pb.Sampling(lark='start: (("a"{1,1000}){1,1000}){1,1000}'),
    "intersections": lambda: pb.Sampling(
        lark="start: A\nA: " + " & ".join(f"~/(.|\\n)*a.{{{n}}}b(.|\\n)*/" for n in range(60))
    ),
    "switched off checks": lambda: _schema({"x-guidance": {"lenient": True}, "not": {}}),
    "fetched reference": lambda: _schema({"$ref": "http://127.0.0.1:1/x"}),
}


async def refusal(tier: Tier, asked: pb.GenerateRequest) -> str:
    """Return why a request is rejected, or "valid"; raise an error that is not meant for it."""
    try:
        await collect(tier.client, asked, timeout=PATIENCE)
    except (errors.InvalidSampling, errors.SequenceFault) as error:
        return error.message
    return "valid"


@pytest.mark.parametrize("name", FORMS)
async def test_a_hostile_form_ends_in_a_typed_error_or_a_valid_answer(name: str) -> None:
    sampling = FORMS[name]()
    sampling.max_tokens = 8
    async with running_tier([EchoEngine()]) as tier:
        message = await refusal(tier, pb.GenerateRequest(prompt="aaaa", sampling=sampling))
        assert len(message) < 1000
        assert message.isprintable()
        assert sum(child.memory_info().rss for child in psutil.Process().children()) < MEMORY
        assert (await collect(tier.client, pb.GenerateRequest(prompt="ok"))).text == "ok"
        form = pb.Sampling(choices=pb.Choices(texts=["ok"]))
        assert (await collect(tier.client, pb.GenerateRequest(prompt="ok", sampling=form))).text == "ok"


async def test_others_are_answered_while_a_grammar_takes_all_time_it_may() -> None:
    async with running_tier([EchoEngine()]) as tier:
        hostile = asyncio.create_task(
            collect(tier.client, pb.GenerateRequest(prompt="x", sampling=_slow()), timeout=PATIENCE)
        )
        await eventually(lambda: tier.batcher.intake.waiting == 1)
        answers = [await collect(tier.client, pb.GenerateRequest(prompt=f"no {n}")) for n in range(5)]
        assert not hostile.done()
        with pytest.raises(errors.InvalidSampling, match="CPU time"):
            await hostile

    assert all(isinstance(answer, Answer) for answer in answers)


async def test_random_text_as_a_form_is_valid_or_rejected() -> None:
    rng = random.Random(f"{SEED} forms")
    letters = '{}[]"\\:,.*+?|()/<>@%~&a1$ \n'
    async with running_tier([EchoEngine()]) as tier:
        for number in range(150):
            text = "".join(rng.choice(letters) for _ in range(rng.randrange(1, 40)))
            sampling = [
                pb.Sampling(json_schema=json.dumps({"pattern": text})),
                pb.Sampling(regex=text),
                pb.Sampling(lark=f"start: {text}"),
                pb.Sampling(choices=pb.Choices(texts=[text])),
            ][number % 4]
            sampling.max_tokens = 4
            message = await refusal(tier, pb.GenerateRequest(prompt="x", sampling=sampling))
            assert message.isprintable()
