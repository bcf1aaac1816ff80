"""A router dies during answers that a gateway streams over HTTP; their callers notice nothing."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from headrace.cli.launch.mesh import reserved_ports
from headrace.v1 import generation_pb2 as pb
from tests.faults.dice import expected
from tests.faults.fleet import HOST, START_SECONDS, Child, Fleet
from tests.faults.tally import PATIENT_SECONDS, Row, Visit, until_affected

REQUESTS = 40


@asynccontextmanager
async def gateway(fleet: Fleet, folder: Path) -> AsyncGenerator[str, None]:
    """Run a gateway in front of the routers of a fleet while the block runs. Yields its URL."""
    with reserved_ports(1) as (port,):
        flags = ["--router", fleet.target]
        child = Child("gateway0", "headrace.gateway", flags, port, folder / "gateway.log")
        url = f"http://{HOST}:{port}"
        await child.start()
        try:
            async with asyncio.timeout(START_SECONDS), httpx.AsyncClient(trust_env=False) as client:
                while not await _ready(client, url):
                    assert child.alive, child.tail()
                    await asyncio.sleep(0.05)
            yield url
        finally:
            await child.kill()


async def _ready(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/health")).is_success
    except httpx.TransportError:
        return False


async def visit(client: httpx.AsyncClient, url: str, prompt: str, seed: int, begun: set[int]) -> Visit:
    """Stream one sampled answer, and compare its text with that of a mesh without faults.

    begun   gets the seed when the first text has arrived
    """
    sampling: dict[str, Any] = {
        "max_tokens": 100,
        "temperature": 1.0,
        "seed": seed,
        "ignore_eos": True,
    }
    seen, text = Visit(), ""
    body = {"model": "auto", "prompt": prompt, "stream": True, **sampling}
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        lines = [line.removeprefix("data: ") async for line in _noting(response, begun, seed) if line]
    for line in lines[:-1]:
        for choice in json.loads(line).get("choices", ()):
            text += choice["text"]
            seen.outcome = choice["finish_reason"] or seen.outcome
    request = pb.GenerateRequest(prompt=prompt, sampling=pb.Sampling(**sampling))
    whole = expected(request, seed)
    seen.tokens = len(text)  # a token is a byte
    seen.lost, seen.twice = max(len(whole.text) - len(text), 0), max(len(text) - len(whole.text), 0)
    seen.wrong = (text, lines[-1]) != (whole.text, "[DONE]")
    seen.problem = f"{prompt!r} came as {text!r} and {lines[-1]!r}, is {whole.text!r}" if seen.wrong else ""
    seen.error = lines[-1]
    return seen


async def _noting(response: httpx.Response, begun: set[int], seed: int) -> AsyncGenerator[str, None]:
    async for line in response.aiter_lines():
        begun.add(seed)
        yield line


async def test_a_router_that_is_killed_behind_a_gateway(
    twins: Fleet, row: Callable[[str], Row], rng: random.Random, tmp_path: Path
) -> None:
    """The gateway's client resumes each answer on the other router: the text is that without a fault."""
    counted = row("SIGKILL of a router behind a gateway, another stands by")
    limits = httpx.Limits(max_connections=REQUESTS)
    async with (
        gateway(twins, tmp_path) as url,
        httpx.AsyncClient(timeout=PATIENT_SECONDS, limits=limits, trust_env=False) as client,
    ):
        for _ in until_affected(counted, 10):
            await twins.heal()
            begun: set[int] = set()
            prompts = ["".join(rng.choices("abcdefgh ", k=30)) for _ in range(REQUESTS)]
            streams = [
                asyncio.create_task(visit(client, url, prompt, rng.getrandbits(63), begun))
                for prompt in prompts
            ]
            while len(begun) < REQUESTS / 3 and not all(stream.done() for stream in streams):
                await asyncio.sleep(0.002)
            victim = await twins.busiest_router()
            counted.moved += (await victim.inspect()).process_state.requests
            await victim.kill()
            counted.add(await asyncio.gather(*streams))

    counted.check()
    assert counted.moved >= 10, "the kill affected answers"
