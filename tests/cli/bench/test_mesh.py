"""A mesh is measured over real gRPC."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from headrace.cli.bench.backends.mesh import MeshBackend, MeshFailed
from headrace.cli.bench.backends.openai import OpenAiOptions, connect_openai
from headrace.cli.bench.figures import summarize
from headrace.cli.bench.load import Run, send
from headrace.cli.bench.options import Load
from headrace.cli.bench.prompts import ListedPrompts, Prompt, built_in
from headrace.cli.bench.records import Record
from headrace.cli.calls.connection import Connection
from headrace.gateway.__main__ import gateway
from headrace.gateway.settings import Settings
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, Mesh, eventually, running_mesh
from tests.router.fake_batchers import FakeBatcher, routed
from tests.test_client import Reciter, calling

PROMPT = Prompt((("user", "What is the capital of France?"),), 12, exact=True)


def of(mesh: Mesh, **options: object) -> MeshBackend:
    return MeshBackend(mesh.client, where="", **options)  # type: ignore[arg-type]


async def test_an_answer_is_recorded(mesh: Mesh) -> None:
    record, backend = Record(parts=[]), of(mesh, tier="large")

    await backend.ask(PROMPT, record, timeout=PATIENCE)

    assert (record.tokens, record.output_tokens, sum(record.counts)) == (12, 12, 12)
    assert len(record.times) == len(record.counts)
    assert list(record.times) == sorted(record.times)
    assert (record.complete, record.finish, record.tier, record.model) == (True, "length", "large", "echo")
    assert record.input_tokens == len("What is the capital of France?")
    assert record.cached_tokens == 0
    assert backend.text_of(record) == "What is the "
    assert backend.model == "echo"


async def test_a_text_alone_has_the_tokens_that_its_service_reports() -> None:
    usage = pb.Usage(prompt_tokens=20, completion_tokens=9)
    record, unreported, lost = Record(), Record(), Record()
    for fake, made in (
        (FakeBatcher(text_only=True, usage=usage), record),
        (FakeBatcher(text_only=True), unreported),
        (FakeBatcher(text_only=True, breaks=[5]), lost),
    ):
        async with routed(only=fake) as client:
            asking = MeshBackend(client, where="").ask(PROMPT, made, timeout=PATIENCE)
            if fake.breaks:
                with pytest.raises(MeshFailed) as raised:
                    await asking
            else:
                await asking

    length = len(PROMPT.turns[0][1])
    assert (record.input_tokens, record.tokens, sum(record.counts)) == (20, 9, length)
    assert (unreported.input_tokens, unreported.tokens) == (None, length)
    assert (raised.value.kind, sum(lost.counts)) == ("UPSTREAM_LOST", 5)


async def test_raw_text_needs_no_template(mesh: Mesh) -> None:
    record, backend = Record(parts=[]), of(mesh, chat_api=False, temperature=0.0)

    await backend.ask(Prompt((("user", "abc"),), 9), record, timeout=PATIENCE)

    assert (backend.text_of(record), record.finish) == ("abc", "stop"), "the end is not ignored"


async def test_a_rejection_is_a_failure_with_its_reason(mesh: Mesh) -> None:
    for options, reason in (({"tier": "huge"}, "UNKNOWN_TIER"), ({"model": "gpt"}, "UNKNOWN_MODEL")):
        with pytest.raises(MeshFailed) as raised:
            await of(mesh, **options).ask(PROMPT, Record(), timeout=PATIENCE)
        assert raised.value.kind == reason


async def test_an_answer_that_takes_too_long_is_a_failure() -> None:
    async with running_mesh("only", engine=functools.partial(EchoEngine, step_seconds=0.05)) as mesh:
        record = Record()
        with pytest.raises(MeshFailed) as raised:
            await of(mesh).ask(Prompt(PROMPT.turns, 10_000, exact=True), record, timeout=0.5)
        assert raised.value.kind.startswith("DEADLINE")
        assert not record.complete
        await eventually(lambda: not mesh.left_behind)


async def test_a_whole_run_has_tiers_costs_and_cached_tokens() -> None:
    prices = {"prices": "small=1/1,large=10/10"}
    async with running_mesh(router_settings=prices) as mesh:
        run = Run()
        prompts = ListedPrompts(built_in(0), max_tokens=5)
        await send(of(mesh), prompts, Load(concurrency=16, requests=64), run)

    result = summarize(run, percents=[50, 99], goodput={"e2el": PATIENCE})
    assert (result["completed"], result["failed"], result["errors_by_kind"]) == (64, 0, {})
    assert result["output_tokens_from"] == "server"
    assert result["total_output_tokens"] == sum(record.tokens for record in run.records)
    assert result["goodput_share"] == 1
    ours = result["headrace"]
    assert {tier: own["requests"] for tier, own in ours["tiers"].items()} == Counter(
        record.tier for record in run.records
    )
    assert sum(own["share"] for own in ours["tiers"].values()) == pytest.approx(1)
    assert 0 < ours["cost"] < ours["largest_tier_cost"]
    assert ours["failovers"] == {}


async def test_a_failover_is_counted() -> None:
    """The stream breaks after one token, and the client resumes the answer."""
    async with calling(Reciter(1)) as client:
        record = Record()
        await MeshBackend(client, where="", chat_api=False).ask(
            Prompt((("user", "abc"),), 9), record, timeout=PATIENCE
        )

    assert record.moves == ["UNAVAILABLE"]
    assert record.complete


async def test_a_gateway_is_measured_like_any_server(mesh: Mesh) -> None:
    """It reports tiers and cached tokens over HTTP as well."""
    run = Run()
    async with gateway(Settings(port=0, router=f"127.0.0.1:{mesh.port}")) as running:
        options = OpenAiOptions(url=f"http://127.0.0.1:{running.port}/v1")
        async with connect_openai(options, Connection(target="")) as backend:
            await send(backend, ListedPrompts(built_in(0), 5), Load(concurrency=8, requests=16), run)

    result = summarize(run, percents=[99])
    assert (result["completed"], result["errors_by_kind"]) == (16, {})
    assert result["output_tokens_from"] == "server"
    assert result["total_output_tokens"] == 16 * 5
    assert sum(own["requests"] for own in result["headrace"]["tiers"].values()) == 16
