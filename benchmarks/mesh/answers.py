"""Send one request through the mesh, check its answer, and record when its tokens arrived."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from headrace.cli.bench.latencies import gaps
from headrace.client import Client
from headrace.v1 import generation_pb2 as pb

T = TypeVar("T")

TIMEOUT = 300.0  # seconds for one answer


@dataclass(slots=True)
class Answer:
    """When the tokens of one answer arrived; all times by `time.perf_counter`.

    began      when the request was made
    arrivals   of each message with tokens: when it arrived, and its number of tokens
    messages   all messages of the answer; 0 if it was not sent in messages
    ended      when the answer was complete
    """

    began: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    messages: int = 0
    ended: float = 0.0

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(count for _, count in self.arrivals)

    @property
    def first(self) -> float:
        """When the first token arrived."""
        return self.arrivals[0][0]

    @property
    def last(self) -> float:
        """When the last token arrived."""
        return self.arrivals[-1][0]

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive messages with tokens."""
        return gaps([at for at, _ in self.arrivals])

    @property
    def tpot(self) -> float:
        """Seconds per token after the first message."""
        return (self.last - self.first) / max(self.tokens - self.arrivals[0][1], 1)


class WrongAnswer(Exception):
    """An answer has lost, added or mixed-up tokens."""


def prompt(number: int) -> str:
    """Return a prompt that differs from those of all other streams."""
    return f"stream {number:04} says hello, "


def expected(number: int, tokens: int) -> str:
    """Return the echo engine's answer: one token per character, and the prompt again after its end."""
    text = prompt(number)
    return (text * (tokens // len(text) + 1))[:tokens]


def request(number: int, tokens: int, *, flush_tokens: int = 0) -> pb.GenerateRequest:
    """Return the request of one stream.

    flush_tokens   tokens per message; 0 for the mesh's own policy
    """
    message = pb.GenerateRequest(
        prompt=prompt(number), sampling=pb.Sampling(max_tokens=tokens, ignore_eos=True)
    )
    if flush_tokens:
        message.stream.flush_tokens = flush_tokens
    return message


async def ask(client: Client, number: int, tokens: int, *, flush_tokens: int = 0) -> Answer:
    """Send one request, read its answer, and check it. Raises WrongAnswer, and the client's errors."""
    answer, text = Answer(time.perf_counter()), ""
    message = request(number, tokens, flush_tokens=flush_tokens)
    async with aclosing(client.generate(message, timeout=TIMEOUT)) as stream:
        async for response in stream:
            answer.messages += 1
            if response.HasField("delta"):
                answer.arrivals.append((time.perf_counter(), response.delta.token_count))
                text += response.delta.text
    answer.ended = time.perf_counter()
    if text != (right := expected(number, tokens)):
        raise WrongAnswer(f"stream {number} has a wrong answer: {text[:60]!r} instead of {right[:60]!r}")
    return answer


async def at_once(call: Callable[[int], Awaitable[Answer]], streams: int) -> list[Answer]:
    """Make *streams* calls that start at the same time; *call* makes the one with a number."""
    return list(await asyncio.gather(*(call(number) for number in range(streams))))


async def closed_loop(
    callers: int, seconds: float, call: Callable[[int], Awaitable[T]], *, spread: float = 0.0
) -> list[T]:
    """Run *callers* callers that make one call after the other, and return what all calls returned.

    seconds   after this time no further call starts
    call      makes the call of the caller with this number
    spread    the first calls start evenly over this many seconds
    """
    done: list[T] = []
    ends = time.perf_counter() + seconds

    async def caller(number: int) -> None:
        await asyncio.sleep(spread * number / callers)
        while time.perf_counter() < ends:
            done.append(await call(number))

    await asyncio.gather(*(caller(number) for number in range(callers)))
    return done
