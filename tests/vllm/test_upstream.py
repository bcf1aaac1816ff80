"""vLLM's own server, with OpenAI's API, behind an upstream."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from headrace.cli.launch.mesh import reserved_ports
from headrace.v1 import generation_pb2 as pb
from tests.harness import PATIENCE, collect, eventually
from tests.upstream.services import check_service
from tests.upstream.tier import ask, running_upstream

START_SECONDS = 600.0  # vLLM takes half a minute, several times that on a busy machine
CONTEXT = 1024


@asynccontextmanager
async def server(python: str, folder: Path, log: Path) -> AsyncGenerator[str, None]:
    """Run vLLM's server, and return its base URL."""
    with reserved_ports(1) as (port,), log.open("wb") as output:
        arguments = ["--host", "127.0.0.1", "--port", port, "--served-model-name", "gpt-fake"]
        engine = ["--enforce-eager", "--block-size", 32, "--dtype", "float32", "--max-model-len", CONTEXT]
        # The module, because the command needs metadata of a package named vllm.
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", folder, *arguments, *engine]
        process = await asyncio.create_subprocess_exec(
            *(python, *map(str, command)),
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            stdout=output,
            stderr=output,
        )
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            if process.returncode is None:
                process.terminate()
                await asyncio.wait_for(process.wait(), PATIENCE)


async def test_the_server_of_vllm_serves_a_tier(python: str, folder: Path, tmp_path: Path) -> None:
    async with (
        server(python, folder, tmp_path / "vllm.log") as url,
        running_upstream(url, ready=False, api="vllm", first_token_seconds=300) as tier,
    ):
        await eventually(lambda: tier.running.server.health.ready, timeout=START_SECONDS)
        (listed,) = (await tier.client.list_tiers()).tiers
        assert listed.limits.context_length == CONTEXT

        await check_service(tier)

        first, second = [
            await collect(tier.client, ask("Name an animal.", temperature=1, seed=7, max_tokens=20))
            for _ in range(2)
        ]
        assert first.text == second.text
        # vLLM counts the tokens of each event, and at the end also that of the end of the turn.
        assert first.tokens <= first.finish.usage.completion_tokens <= first.tokens + 1
        chosen = ask("Yes or no?", temperature=0, choices=pb.Choices(texts=["yes", "no"]))
        assert (await collect(tier.client, chosen)).text in ("yes", "no")
        many = [collect(tier.client, ask(f"Count to {number}.", max_tokens=20)) for number in range(16)]
        assert all(answer.text for answer in await asyncio.gather(*many))
