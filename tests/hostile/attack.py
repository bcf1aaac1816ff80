"""Run one attack as a process: `python -m tests.hostile.attack NAME PORT SEED SECONDS`.

It prints one line of JSON: the number of attempts by outcome.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from headrace.runtime.serving.limits import raise_file_limit
from tests.hostile.wire import Peer


@dataclass
class Attack:
    """One run of an attack.

    outcomes   the number of attempts by outcome: a gRPC status name, or what `Peer.outcome` adds
    """

    port: int
    rng: random.Random
    ends: float
    # Another address than the honest caller's, as in reality.
    source: str = "127.0.0.2"
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def over(self) -> bool:
        """Whether its time has passed."""
        return time.monotonic() >= self.ends

    def count(self, peer: Peer, streams: Sequence[int]) -> None:
        """Count the outcomes of *streams*, and drop them."""
        for stream in streams:
            self.outcomes[peer.outcome(stream)] += 1
            del peer.answers[stream]


Run = Callable[[Attack], Awaitable[None]]
ATTACKS: dict[str, Run] = {}


def attack(run: Run) -> Run:
    """Register an attack under its function's name."""
    ATTACKS[run.__name__] = run
    return run


async def main(name: str, port: int, seed: int, seconds: float) -> None:
    """Run one attack and print its outcomes."""
    for module in ("contents", "floods", "fuzz", "multiplexers", "peers"):
        importlib.import_module(f"tests.hostile.{module}")
    # The registry of the imported module; this one is `__main__`.
    from tests.hostile.attack import ATTACKS, Attack

    raise_file_limit()
    run = Attack(port, random.Random(f"{seed} {name}"), time.monotonic() + seconds)
    async with asyncio.timeout(seconds + 60):
        await ATTACKS[name](run)
    print(json.dumps(run.outcomes))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
