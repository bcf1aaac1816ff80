"""Keep what callers say of their answers: which request it was, and, where asked for, on disk.

A prompt is remembered and written only where a file was set for it: prompts are the callers' own. The rows
are what `headrace calibrate` and `headrace train` read.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from headrace import errors


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that was answered.

    prompt   what was scored; empty where no file is kept
    """

    tier: str
    score: float
    prompt: str = ""


class Feedback:
    """The last requests, and the file for what is said of them.

    path        rows of JSON, one a line; None keeps nothing on disk
    max_bytes   beyond this the file becomes PATH.1, in place of an older one: twice this is the most on disk
    remembered  requests that may still be spoken of
    """

    def __init__(
        self, path: Path | None = None, *, max_bytes: int = 64 * 1024 * 1024, remembered: int = 10_000
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._remembered = remembered
        self._answered: OrderedDict[str, Answered] = OrderedDict()
        self._writing = asyncio.Lock()

    def require_writable(self) -> None:
        """Make the file, empty, unless it is there. Raises OSError where rows could not be kept."""
        if self._path is not None:
            self._write(self._path, b"")

    def remember(self, request_id: str, answered: Answered) -> None:
        """Book an answer; the oldest is forgotten for it."""
        if self._path is None:
            answered = Answered(answered.tier, answered.score)
        self._answered[request_id] = answered
        self._answered.move_to_end(request_id)
        while len(self._answered) > self._remembered:
            self._answered.popitem(last=False)

    def recall(self, request_id: str) -> Answered:
        """What is known of a request. Raises UnknownRequest."""
        try:
            return self._answered[request_id]
        except KeyError:
            raise errors.UnknownRequest(
                f"no request {request_id!r} among the last {self._remembered} that this router answered",
                field="request_id",
            ) from None

    async def keep(self, request_id: str, tier: str, quality: float) -> bool:
        """Write a row about *tier*'s answer; whether there is a file for it. Raises UnknownRequest, OSError.

        quality   0 to 1
        """
        answered = self.recall(request_id)
        if self._path is None:
            return False
        row = {
            "id": request_id,
            "time": round(time.time(), 3),
            "prompt": answered.prompt,
            "score": round(answered.score, 6),
            "tier": tier,
            f"{tier}_ok": quality,
        }
        line = json.dumps(row, ensure_ascii=False) + "\n"
        async with self._writing:
            await asyncio.to_thread(self._write, self._path, line.encode())
        return True

    def _write(self, path: Path, line: bytes) -> None:
        # Readable by its owner alone: it holds what callers wrote.
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            full = os.fstat(handle).st_size + len(line) > self._max_bytes
            if not full:
                os.write(handle, line)
        finally:
            os.close(handle)
        if full:
            os.replace(path, path.with_name(path.name + ".1"))
            if len(line) <= self._max_bytes:
                self._write(path, line)
