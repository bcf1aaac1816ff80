"""`headrace chat`: ask, and show the answer as it comes. `conversation` does so again and again.

The answer goes to standard output and the figures to standard error, so that a pipe gets the answer
alone.
"""

from __future__ import annotations

import sys
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from headrace.cli.answers import Answer, printable
from headrace.client import Client, chat, connect
from headrace.runtime.telemetry.setup import telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from headrace.v1 import generation_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """How to ask: what the flags of `headrace chat` say."""

    target: str
    timeout: float = 120.0  # seconds for a whole answer
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    system: str = ""
    tier: str = ""
    min_tier: str = ""
    max_tier: str = ""


def request_for(turns: Sequence[tuple[str, str]], wishes: Wishes, *, session: str = "") -> pb.GenerateRequest:
    """Make the request for the next turn of a conversation of (role, content) pairs.

    session   names the conversation to the router, which then keeps it on the tier that it has reached
    """
    sampling = {
        name: value
        for name in ("temperature", "max_tokens", "seed")
        if (value := getattr(wishes, name)) is not None
    }
    request = chat(turns, system=wishes.system, **sampling)
    request.routing.tier = wishes.tier
    request.routing.min_tier = wishes.min_tier
    request.routing.max_tier = wishes.max_tier
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
    """Fill *answer* as it comes, giving each piece of text to *write*. Raises a HeadraceError."""
    began = time.perf_counter()
    async with aclosing(client.generate(request, timeout=timeout)) as stream:
        async for response in stream:
            if text := answer.take(response, time.perf_counter() - began):
                write(text)


async def say(client: Client, request: pb.GenerateRequest, wishes: Wishes, answer: Answer) -> None:
    """Print an answer as it comes, filling *answer*, and its figures. Raises a HeadraceError."""

    def write(text: str) -> None:
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    try:
        await follow(client, request, answer, timeout=wishes.timeout, write=write)
    finally:
        if answer.text and not answer.text.endswith("\n"):
            write("\n")
    aside().print(answer.figures(), style="dim", markup=False, soft_wrap=True)


async def once(prompt: str, wishes: Wishes) -> None:
    """Answer one prompt, and name the request: for `headrace feedback`, or to find it in logs and traces.

    Raises a HeadraceError.
    """
    answer = Answer()
    try:
        async with telemetry("client"), connect(wishes.target) as client:
            await say(client, request_for([("user", prompt)], wishes), wishes, answer)
    finally:
        if answer.request_id:
            aside().print(
                f"request {printable(answer.request_id)}", style="dim", markup=False, soft_wrap=True
            )


def aside() -> Console:
    """Where all is said that is not the answer."""
    return Console(stderr=True, highlight=False)
