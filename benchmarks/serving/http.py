"""Run peers that are HTTP servers, which stream token ids: vLLM (OpenAI API) and llama.cpp (its own API)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.serving.children import START_SECONDS, died, process
from benchmarks.serving.systems import SystemFailed
from benchmarks.serving.workload import Request

Body = Callable[[Request], dict[str, Any]]
Reader = Callable[[dict[str, Any]], Sequence[int]]


class Server:
    """A running HTTP server.

    url    where to POST requests
    body   makes the body of a request
    read   returns the token ids in one event of the stream
    """

    def __init__(
        self, pid: int, session: aiohttp.ClientSession, url: str, body: Body, read: Reader, version: str
    ) -> None:
        self.pids = [pid]
        self.versions = {"server": version}
        self._session, self._url, self._body, self._read = session, url, body, read

    async def generate(self, request: Request) -> AsyncGenerator[Sequence[int], None]:
        """Stream the answer; see `systems.Running`."""
        async with self._session.post(self._url, json=self._body(request)) as response:
            if response.status != 200:
                raise SystemFailed(f"{self._url} returned {response.status}: {await response.text()}")
            async for line in response.content:
                if line.startswith(b"data: ") and b"[DONE]" not in line:
                    yield self._read(json.loads(line[len("data: ") :]))


@asynccontextmanager
async def server(
    name: str,
    command: Sequence[str],
    port: int,
    log: Path,
    *,
    path: str,
    body: Body,
    read: Reader,
    version: str,
    environment: Mapping[str, str] | None = None,
) -> AsyncGenerator[Server, None]:
    """Run a server on 127.0.0.1:*port*; the block is entered when its /health succeeds."""
    base = f"http://127.0.0.1:{port}"
    async with (
        process(name, command, log, environment) as child,
        # One connection per request: llama.cpp's server closes idle ones while they are being reused.
        aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None),
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        ) as session,
    ):
        ends = time.monotonic() + START_SECONDS
        while not await _healthy(session, base):
            if child.returncode is not None or time.monotonic() > ends:
                raise died(name, child, log)
            await asyncio.sleep(0.2)
        yield Server(child.pid, session, base + path, body, read, version)


async def _healthy(session: aiohttp.ClientSession, base: str) -> bool:
    try:
        async with session.get(f"{base}/health", timeout=aiohttp.ClientTimeout(total=2)) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


def openai_body(request: Request) -> dict[str, Any]:
    """Return a completion request for vLLM: exact length, greedy, with token ids."""
    return {
        "model": "m",
        "prompt": list(request.prompt_ids),
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def openai_ids(event: dict[str, Any]) -> Sequence[int]:
    """Return the new ids in a chunk."""
    return [id for choice in event.get("choices", ()) for id in choice.get("token_ids") or ()]


def llama_body(request: Request) -> dict[str, Any]:
    """Return a completion request for llama-server, without its prompt cache."""
    return {
        "prompt": list(request.prompt_ids),
        "n_predict": request.output_tokens,
        "temperature": 0,
        "top_k": 1,
        "samplers": ["top_k"],
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": False,
        "return_tokens": True,
    }


def llama_ids(event: dict[str, Any]) -> Sequence[int]:
    """Return the new ids in an event; the last event repeats earlier ones."""
    return [] if event.get("stop") else event.get("tokens") or []
