"""Real services behind an upstream: the gateway of another mesh, and llama.cpp's server if there is one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from headrace import models
from headrace.cli.launch.mesh import reserved_ports
from headrace.gateway.__main__ import gateway
from headrace.gateway.settings import Settings as GatewaySettings
from headrace.v1 import generation_pb2 as pb
from tests.harness import collect, eventually, prompt, running_mesh
from tests.upstream.services import check_service
from tests.upstream.tier import ask, running_upstream

LLAMA_SERVER = os.environ.get("HEADRACE_LLAMA_SERVER", "")


@asynccontextmanager
async def other_mesh() -> AsyncGenerator[str, None]:
    """Run another mesh, and return the base URL of its gateway."""
    async with (
        running_mesh() as mesh,
        gateway(GatewaySettings(port=0, router=f"127.0.0.1:{mesh.port}")) as running,
    ):
        yield f"http://127.0.0.1:{running.port}/v1"


async def test_the_gateway_of_another_mesh_serves_a_tier() -> None:
    async with other_mesh() as url, running_upstream(url, model="large", api="vllm") as tier:
        await check_service(tier)


async def test_an_answer_through_another_mesh_is_that_of_the_mesh_itself() -> None:
    async with other_mesh() as url, running_upstream(url, model="small", api="vllm") as tier:
        request = prompt("The same text, with ünïcode and 漢字.", temperature=0)

        answer = await collect(tier.client, request)

        assert answer.text == request.prompt
        assert answer.finish.reason == pb.FINISH_REASON_STOP
        assert answer.finish.usage.completion_tokens == len(request.prompt.encode())
        assert answer.accepted.model == "small"


async def test_the_context_length_of_another_mesh_is_known() -> None:
    async with other_mesh() as url, running_upstream(url, model="large", api="vllm") as tier:
        (listed,) = (await tier.client.list_tiers()).tiers

        assert listed.limits.context_length == 4096


async def test_thirty_answers_of_another_mesh_arrive_at_the_same_time() -> None:
    async with other_mesh() as url, running_upstream(url, model="large", api="vllm") as tier:
        asked = [ask(f"number {number} " * 20) for number in range(30)]
        answers = await asyncio.gather(*(collect(tier.client, request) for request in asked))

        assert [answer.text for answer in answers] == [one.chat.messages[0].content for one in asked]
        await eventually(lambda: not tier.left_behind)


@pytest.mark.model
@pytest.mark.skipif(not LLAMA_SERVER, reason="HEADRACE_LLAMA_SERVER names no llama-server")
async def test_the_server_of_llama_cpp_serves_a_tier() -> None:
    path = models.resolve(models.SMALL, models.cache_folder())
    with reserved_ports(1) as (port,):
        arguments = ["--model", path, "--port", port, "--ctx-size", 1024, "--threads", 2, "--jinja"]
        process = await asyncio.create_subprocess_exec(
            LLAMA_SERVER,
            *map(str, arguments),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{port}/v1"
            async with running_upstream(url, api="llama.cpp") as tier:
                await check_service(tier)
        finally:
            process.kill()
            await process.wait()
