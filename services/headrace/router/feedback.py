"""Keep what callers say of their answers: which request it was, and, where asked for, on disk.

A prompt is remembered and written only where a file was set for it: prompts are the callers' own. The rows
are what `headrace calibrate` and `headrace train` read.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from headrace import errors

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that was answered.

    prompt   what was scored; empty where no file is kept, or none that holds it
    """

    tier: str
    score: float
    prompt: str = ""


class Feedback:
    """The last requests, and the file for what is said of them.

    path        rows of JSON, one a line; None keeps nothing on disk
    max_bytes   beyond this the file becomes PATH.1, in place of an older one: twice this is the most on disk
    remembered  requests that may still be spoken of; fewer, where their prompts have more than *max_bytes*
                characters together

    Raises OSError for a file that cannot be written.
    """

    def __init__(
        self, path: Path | None = None, *, max_bytes: int = 64 * 1024 * 1024, remembered: int = 10_000
    ) -> None:
        if path is not None:
            os.close(_open(path))
        self._path = path
        self._max_bytes = max_bytes
        self._remembered = remembered
        self._answered: OrderedDict[str, Answered] = OrderedDict()
        self._characters = 0  # of the prompts in it
        # One thread, so one row after the other: one that is being written is, though its caller has left.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="feedback")

    def remember(self, request_id: str, answered: Answered) -> None:
        """Book an answer; the oldest is forgotten for it."""
        if self._path is None or len(answered.prompt) > self._max_bytes:
            answered = Answered(answered.tier, answered.score)
        if (before := self._answered.pop(request_id, None)) is not None:
            self._characters -= len(before.prompt)
        self._answered[request_id] = answered
        self._characters += len(answered.prompt)
        while len(self._answered) > self._remembered or self._characters > self._max_bytes:
            self._characters -= len(self._answered.popitem(last=False)[1].prompt)

    def recall(self, request_id: str) -> Answered:
        """What is known of a request. Raises UnknownRequest."""
        try:
            return self._answered[request_id]
        except KeyError:
            raise errors.UnknownRequest(
                f"no request {errors.quoted(request_id)} among the last {self._remembered} that this router "
                "answered",
                field="request_id",
            ) from None

    async def keep(self, request_id: str, tier: str, quality: float) -> bool:
        """Write a row about *tier*'s answer; whether there is a file for it.

        Raises UnknownRequest, and InternalError where the file cannot be written.

        quality   0 to 1
        """
        answered = self.recall(request_id)
        if self._path is None or not answered.prompt:
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
        data = line.encode()
        if len(data) > self._max_bytes:
            return False
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._write, self._path, data)
        except OSError as error:
            log.error("feedback not kept", extra={"file": str(self._path), "problem": str(error)})
            raise errors.InternalError(
                f"the router cannot write its file of feedback ({error.strerror or error}); nothing was kept"
            ) from error
        return True

    def _write(self, path: Path, line: bytes) -> None:
        if not self._append(path, line):
            os.replace(path, path.with_name(path.name + ".1"))
            self._append(path, line)

    def _append(self, path: Path, line: bytes) -> bool:
        """Whether there was room for the row: then it is written."""
        handle = _open(path)
        try:
            size = os.fstat(handle).st_size
            if size + len(line) > self._max_bytes:
                return False
            if os.write(handle, line) < len(line):
                # Half a row would spoil the next one, too, and the file for whoever reads it.
                os.ftruncate(handle, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return True
        finally:
            os.close(handle)


def _open(path: Path) -> int:
    # Readable by its owner alone: it holds what callers wrote.
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
