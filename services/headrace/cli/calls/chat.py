"""`headrace chat`: send a prompt, and print the answer while it is streamed.

The answer is written to standard output and everything else to standard error, so that a pipe receives only
the answer. `conversation` sends several prompts.
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
        for name in ("temperature", "max_tokens", "seed")
        if (value := getattr(options, name)) is not None
    }
    request = chat(turns, system=options.system, **sampling)
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
) -> None:
    """Add the events of an answer to *answer*, and pass its text to *write*. Raises a HeadraceError."""
    began = time.perf_counter()
    async with aclosing(client.generate(request, timeout=timeout)) as stream:
        async for response in stream:
            if text := answer.add(response, time.perf_counter() - began):
                write(text)


async def print_answer(
    client: Client, request: pb.GenerateRequest, options: ChatOptions, answer: Answer
) -> None:
    """Print an answer while it is streamed, then its figures. Raises a HeadraceError."""

    def write(text: str) -> None:
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    try:
        await follow(client, request, answer, timeout=options.timeout, write=write)
    finally:
        if answer.text and not answer.text.endswith("\n"):
            write("\n")
    stderr_console().print(answer.figures(), style="dim", markup=False, soft_wrap=True)


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
