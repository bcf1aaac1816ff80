"""An honest caller beside an attack: it sends short requests in turn, and each must be answered."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from headrace import errors
from headrace.client import Client, chat, connect

PAUSE_SECONDS = 0.02
HANG_SECONDS = 30.0


@dataclass
class Seen:
    """The results of the caller.

    seconds    of each request, sorted
    outcomes   "ok", "wrong", "hang", or the error's reason, with counts
    """

    seconds: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> dict[str, int]:
        """All outcomes but "ok"."""
        return {outcome: count for outcome, count in self.outcomes.items() if outcome != "ok"}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile of *values*; 0 if there are none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else 0.0


async def ask(client: Client, number: int, seen: Seen) -> None:
    """Send one request and check its answer: the echo engine repeats the prompt."""
    request = chat(f"question {number}", max_tokens=8)
    request.routing.tenant = "honest"
    began = time.monotonic()
    text, ended = "", False
    try:
        async with asyncio.timeout(HANG_SECONDS):
            async with aclosing(client.generate(request, timeout=HANG_SECONDS, resume=False)) as stream:
                async for response in stream:
                    text += response.delta.text
                    ended = response.WhichOneof("event") == "finish"
        outcome = "ok" if ended and text else "wrong"
    except TimeoutError:
        outcome = "hang"
    except errors.HeadraceError as error:
        outcome = f"{error.reason}: {error}"
    seen.seconds.append(time.monotonic() - began)
    seen.outcomes[outcome] += 1


async def ask_until(target: str, over: asyncio.Event) -> Seen:
    """Send requests on one connection, without retries, until *over* is set."""
    seen = Seen()
    async with connect(target, retries=0) as client:
        while not over.is_set():
            await ask(client, len(seen.seconds), seen)
            await asyncio.sleep(PAUSE_SECONDS)
    return seen


async def ask_for(target: str, seconds: float) -> Seen:
    """Send requests for so long."""
    over = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, over.set)
    return await ask_until(target, over)
