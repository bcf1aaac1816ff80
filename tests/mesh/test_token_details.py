"""Details of tokens pass a whole mesh, also if a worker or batcher is lost while the prompt is computed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import pytest

from headrace.batcher.__main__ import batcher
from headrace.batcher.settings import Settings as BatcherSettings
from headrace.batcher.text.tokens import ByteTokenizer
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import Client, connect
from headrace.router.__main__ import router
from headrace.router.settings import Settings as RouterSettings
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EchoEngine
from tests.harness import PATIENCE, eventually, prompt, running_mesh, running_worker, until_healthy
from tests.tier import Wire, running_tier

TEXT = "each step computes a part of the prompt. " * 12
SLOW = {"step_tokens": 16}
STEP_SECONDS = 0.01


def asked() -> pb.GenerateRequest:
    return prompt(TEXT, max_tokens=40, top_logprobs=2, prompt_logprobs=1)


async def read(
    client: Client, request: pb.GenerateRequest, *, after: int = 0, lose: Callable[[], None] = lambda: None
) -> tuple[list[pb.TokenLogprobs], list[pb.TokenLogprobs], str]:
    """Return the details of prompt and answer, and the text; call *lose* after some parts of the prompt."""
    told: list[pb.TokenLogprobs] = []
    details: list[pb.TokenLogprobs] = []
    text, parts = "", 0
    async with aclosing(client.generate(request, timeout=PATIENCE)) as stream:
        async for response in stream:
            if response.HasField("prompt_tokens"):
                assert not details
                assert response.prompt_tokens.offset == len(told)
                told += response.prompt_tokens.tokens
                parts += 1
                if parts == after:
                    assert len(told) < len(TEXT), "it is not complete yet"
                    lose()
            details += response.delta.tokens
            text += response.delta.text
    return told, details, text


def check(told: list[pb.TokenLogprobs], details: list[pb.TokenLogprobs], text: str) -> None:
    assert text == TEXT[:40]
    assert b"".join(one.token.text for one in told).decode() == TEXT
    assert b"".join(one.token.text for one in details).decode() == text
    assert [one.token.HasField("logprob") for one in told] == [False, *([True] * (len(TEXT) - 1))]
    assert {len(one.top) for one in told[1:]} == {1}
    assert {len(one.top) for one in details} == {2}


@pytest.mark.parametrize("multiplex", [True, False])
async def test_details_of_prompt_and_answer_pass_a_mesh(multiplex: bool) -> None:
    async with running_mesh("only", client_options={"multiplex": multiplex}) as mesh:
        check(*await read(mesh.client, asked()))
        check(*await read(mesh.client, asked()))  # now its blocks are cached
        assert not mesh.left_behind


async def test_a_worker_lost_while_it_computes_a_prompt_changes_no_event() -> None:
    engines = [EchoEngine(step_seconds=STEP_SECONDS) for _ in range(2)]
    async with running_tier(engines, worker_settings=SLOW) as tier:
        whole = await read(tier.client, asked())
        lost = await read(tier.client, asked(), after=3, lose=lambda: tier.wires[tier.serving].reset())

    check(*whole)
    assert lost == whole


@asynccontextmanager
async def routed() -> AsyncGenerator[tuple[Client, list[Wire]], None]:
    """Run a router before two batchers of one tier; yield a client and the wires between them."""
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            running_worker(EchoEngine(step_seconds=STEP_SECONDS), **SLOW)
        )
        wires = []
        for port in stack.enter_context(reserved_ports(2)):
            settings = BatcherSettings(
                port=0, tier="only", workers=f"127.0.0.1:{running.server.port}", fake=True, drain_seconds=2.0
            )
            made = await stack.enter_async_context(batcher(settings, ByteTokenizer(), "b"))
            await eventually(lambda made=made: made.server.health.ready)  # type: ignore[misc]
            wire = Wire(made.server.port, port)
            await wire.join()
            stack.callback(wire.cut)
            wires.append(wire)
        tiers = f"only={'+'.join(f'127.0.0.1:{wire.port}' for wire in wires)}"
        gate = await stack.enter_async_context(router(RouterSettings(port=0, tiers=tiers, poll_seconds=0.1)))
        client = await stack.enter_async_context(connect(f"127.0.0.1:{gate.port}"))
        await eventually(lambda: gate.health.ready)
        await until_healthy(client)
        yield client, wires


async def test_a_batcher_lost_while_a_prompt_is_computed_changes_no_event() -> None:
    async with routed() as (client, wires):
        whole = await read(client, asked())

        def lose() -> None:
            for wire in wires:  # one of them serves the request, and both accept new connections
                wire.reset()

        lost = await read(client, asked(), after=3, lose=lose)

    check(*whole)
    assert lost == whole
