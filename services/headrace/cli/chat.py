"""`headrace chat`: one answer, or a conversation in the terminal.

The answer goes to standard output and the figures to standard error, so that a pipe gets the answer
alone.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from headrace import errors
from headrace.cli.answers import Answer, printable
from headrace.cli.complaints import advice, complain
from headrace.client import Client, chat, connect
from headrace.runtime.telemetry import telemetry

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


def request_for(turns: Sequence[tuple[str, str]], wishes: Wishes) -> pb.GenerateRequest:
    """Make the request for the next turn of a conversation of (role, content) pairs."""
    sampling = {
        name: value
        for name in ("temperature", "max_tokens", "seed")
        if (value := getattr(wishes, name)) is not None
    }
    request = chat(turns, system=wishes.system, **sampling)
    request.routing.tier = wishes.tier
    request.routing.min_tier = wishes.min_tier
    request.routing.max_tier = wishes.max_tier
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


async def once(prompt: str, wishes: Wishes) -> None:
    """Answer one prompt. Raises a HeadraceError."""
    async with telemetry("client"), connect(wishes.target) as client:
        await _answer(client, [("user", prompt)], wishes, Answer())


def conversation(wishes: Wishes) -> None:
    """Talk until Ctrl-D; Ctrl-C stops the answer under way and keeps what was said."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing
    aside = Console(stderr=True, highlight=False)
    aside.print("Ctrl-C stops an answer, /new starts over, Ctrl-D ends.", style="dim")
    turns: list[tuple[str, str]] = []
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        client = runner.run(_open(stack, wishes.target))
        try:
            while True:
                try:
                    said = input("> ").strip()
                except EOFError:
                    aside.print()
                    return
                except KeyboardInterrupt:
                    aside.print("\n(Ctrl-D ends)", style="dim")
                    continue
                if said == "/new":
                    turns = []
                elif said:
                    turns = _turn(runner, client, [*turns, ("user", said)], wishes)
        finally:
            runner.run(stack.aclose())


async def _open(stack: AsyncExitStack, target: str) -> Client:
    await stack.enter_async_context(telemetry("client"))
    return await stack.enter_async_context(connect(target))


def _turn(
    runner: asyncio.Runner, client: Client, turns: list[tuple[str, str]], wishes: Wishes
) -> list[tuple[str, str]]:
    """Take one turn; return the conversation as it stands then, less a question without an answer."""
    answer = Answer()
    try:
        runner.run(_answer(client, turns, wishes, answer))
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        Console(stderr=True).print("(stopped)", style="dim")
    except errors.HeadraceError as error:
        complain(advice(error, wishes.target))
    return [*turns, ("assistant", answer.text)] if answer.text else turns[:-1]


async def _answer(client: Client, turns: Sequence[tuple[str, str]], wishes: Wishes, answer: Answer) -> None:
    def write(text: str) -> None:
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    try:
        await follow(client, request_for(turns, wishes), answer, timeout=wishes.timeout, write=write)
    finally:
        if answer.text and not answer.text.endswith("\n"):
            write("\n")
    aside = Console(stderr=True, highlight=False)
    aside.print(answer.figures(), style="dim", markup=False, soft_wrap=True)
