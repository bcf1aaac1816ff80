"""A small HTTP server that streams events as the tests want: what `headrace bench` meets outside."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Write = Callable[[bytes], Awaitable[None]]
Behaviour = Callable[[dict[str, Any], Write], Awaitable[None]]


@dataclass
class Server:
    """A running server: its base URL, and the requests that it received."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    in_flight: int = 0
    most: int = 0


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(text: str | None = None, *, finish: str | None = None, **other: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    return event({"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **other})


def usage(prompt: int, completion: int, **other: Any) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, **other.pop("details", {})}
    return event({"model": "m", "choices": [], "usage": counts, **other})


DONE = b"data: [DONE]\n\n"


async def words(body: dict[str, Any], write: Write) -> None:
    """Answer with as many words as tokens were asked for, as a server should."""
    await write(
        event({"model": "m", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    )
    for _ in range(body["max_tokens"]):
        await write(chunk("word "))
    prompt = body.get("prompt") or " ".join(message["content"] for message in body["messages"])
    await write(chunk(finish="length") + usage(len(prompt.split()), body["max_tokens"]) + DONE)


class Hangup(Exception):
    """The server closes the connection."""


@asynccontextmanager
async def serving(
    behaviour: Behaviour = words, *, status: int = 200, error: object = None, models: object = None
) -> AsyncGenerator[Server, None]:
    """Run a server that answers with the events of *behaviour*, or with a *status* and an *error*."""
    server = Server("")

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        server.bodies.append(body)
        server.headers.append({name.lower(): value for name, value in request.headers.items()})
        server.paths.append(request.path)
        if status != 200:
            if isinstance(error, str):
                return web.Response(status=status, text=error)
            return web.json_response({"error": error}, status=status)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        server.in_flight += 1
        server.most = max(server.most, server.in_flight)
        try:
            await behaviour(body, response.write)
        except Hangup:
            assert request.transport is not None
            request.transport.abort()
        finally:
            server.in_flight -= 1
        return response

    async def list_models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "first"}, {"id": "second"}]} if models is None else models)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/v1/models", list_models)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield server
    finally:
        await runner.cleanup()
        await asyncio.sleep(0)
