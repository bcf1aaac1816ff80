"""`headrace chat`: send a prompt, and print the answer while it is streamed.

The answer, its text and its calls of tools, is written to standard output and everything else to standard
error, so that a pipe receives only the answer. `conversation` sends several prompts.
"""

from __future__ import annotations

import sys
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from headrace.cli.answers import Answer, printable
from headrace.client import Client, chat
from headrace.runtime.telemetry.setup import telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from headrace.cli.calls.connection import Connection
    from headrace.v1 import generation_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The flags of `headrace chat`."""

    connection: Connection
    timeout: float = 120.0  # seconds for a whole answer
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    json_schema: str | None = None
    json_object: bool | None = None
    regex: str | None = None
    tools: Sequence[pb.Tool] = ()
    system: str = ""
    tier: str = ""
    min_tier: str = ""
    max_tier: str = ""


def request_for(
    turns: Sequence[tuple[str, str]], options: ChatOptions, *, session: str = ""
) -> pb.GenerateRequest:
    """Make the request for the next turn of a conversation of (role, content) pairs.

    session   identifies the conversation, so that turns that continue it do not return to a smaller tier
    """
    sampling = {
        name: value
        for name in ("temperature", "max_tokens", "seed", "json_schema", "json_object", "regex")
        if (value := getattr(options, name)) is not None
    }
    request = chat(turns, system=options.system, tools=options.tools, **sampling)
    request.routing.tier = options.tier
    request.routing.min_tier = options.min_tier
    request.routing.max_tier = options.max_tier
    request.routing.session_id = session
    return request


async def follow(
    client: Client,
    request: pb.GenerateRequest,
    answer: Answer,
    *,
    timeout: float,
    write: Callable[[str], None],
    think: Callable[[str], None] = lambda text: None,
) -> None:
    """Add the events of an answer to *answer*. Raises a HeadraceError.

    write   is passed its text
    think   is passed what the model thinks before it
    """
    began = time.perf_counter()
    async with aclosing(client.generate(request, timeout=timeout)) as stream:
        async for response in stream:
            text = answer.add(response, time.perf_counter() - began)
            if thought := response.delta.reasoning:
                think(thought)
            if text:
                write(text)


async def print_answer(
    client: Client, request: pb.GenerateRequest, options: ChatOptions, answer: Answer
) -> None:
    """Print an answer while it is streamed, then its calls and its figures. Raises a HeadraceError."""
    console = stderr_console()
    open_line = False  # of thoughts

    def think(text: str) -> None:
        nonlocal open_line
        console.print(printable(text), style="dim", markup=False, soft_wrap=True, end="")
        open_line = not text.endswith("\n")

    def write(text: str) -> None:
        nonlocal open_line
        if open_line:
            console.print()
            open_line = False
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    try:
        await follow(client, request, answer, timeout=options.timeout, write=write, think=think)
    finally:
        if answer.text and not answer.text.endswith("\n"):
            write("\n")
        for line in answer.lines_of_calls:
            write(f"{line}\n")
        if open_line:
            console.print()
    console.print(answer.figures(), style="dim", markup=False, soft_wrap=True)


async def ask_once(prompt: str, options: ChatOptions) -> None:
    """Send one prompt, print its answer, and its ids: for `headrace feedback`, and for logs and traces.

    Raises a HeadraceError.
    """
    answer = Answer()
    try:
        async with telemetry("client"), options.connection.open() as client:
            await print_answer(client, request_for([("user", prompt)], options), options, answer)
    finally:
        if answer.request_id:
            stderr_console().print(answer.ids, style="dim", markup=False, soft_wrap=True)


def stderr_console() -> Console:
    """Return the console for everything except answers."""
    return Console(stderr=True, highlight=False)
