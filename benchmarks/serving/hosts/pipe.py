"""The protocol between the benchmark and an engine in a child process: JSON lines on its standard pipes.

In:  {"key": 7, "prompt": [ids], "tokens": 40}, until the end of input.
Out: {"ready": {package: version}} once, then {"tokens": [[key, [ids]], ...]} for each step of the engine.

It depends on no engine and imports only the standard library, because it runs in the peers' environments.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """One request: exactly *tokens* tokens after *prompt*, greedy, end-of-turn ignored."""

    key: int
    prompt: list[int]
    tokens: int


class Pipe:
    """The child's end. Create it before importing libraries, which may print."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print goes to the log
        self._asks: queue.SimpleQueue[Ask | None] = queue.SimpleQueue()
        self._ended = False

    def ready(self, versions: dict[str, str]) -> None:
        """Send that the engine is ready, and start to read requests."""
        self._write({"ready": versions})
        threading.Thread(target=self._listen, daemon=True).start()

    def tokens(self, step: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Send the tokens of one step: (key, ids) of each request that has new ones."""
        if updates := [[key, list(ids)] for key, ids in step]:
            self._write({"tokens": updates})

    def take(self, *, wait: bool, linger: float = 0.0) -> list[Ask] | None:
        """Return the requests that arrived since the last call; None if there will be no more.

        wait     whether to wait for a request if there is none
        linger   seconds to wait for further ones after the first
        """
        if self._ended:
            return None
        taken: list[Ask] = []
        block, timeout = wait, None
        while True:
            try:
                ask = self._asks.get(block, timeout)
            except queue.Empty:
                return taken
            if ask is None:
                self._ended = True
                return taken or None
            taken.append(ask)
            block, timeout = linger > 0, linger or None

    def _listen(self) -> None:
        for line in sys.stdin:
            ask = json.loads(line)
            self._asks.put(Ask(ask["key"], ask["prompt"], ask["tokens"]))
        self._asks.put(None)

    def _write(self, message: dict[str, object]) -> None:
        try:
            self._out.write(json.dumps(message, separators=(",", ":")) + "\n")
        except BrokenPipeError:  # the benchmark has ended
            os._exit(0)
