"""Write each decision and its result to a file, for `headrace replay`.

Rows are collected on the event loop and written by a thread. If it does not keep up, rows are dropped and
counted: a full disk or a slow one delays no request. The text of requests is written only if it is wanted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.metrics import changes as metrics
from headrace.router.changes.answered import Answered, Rating
from headrace.router.state.row_file import RowFile
from headrace.routing.changes import records
from headrace.routing.request import RoutingRequest
from headrace.routing.scoring.conversation import Turn, row_of
from headrace.v1 import generation_pb2 as pb

log = logging.getLogger(__name__)

MAX_PENDING = 4096  # rows that wait for the thread
MAX_PENDING_TEXT = 16 * 1024 * 1024  # characters of their text
_BATCH = 256  # rows that are written at once
_STOP_SECONDS = 5.0  # after which a stopping router does not wait for the disk


@dataclass(frozen=True, slots=True)
class _Row:
    """A row that waits. Its turns have *size* characters."""

    fields: dict[str, Any]
    turns: Sequence[Turn] = ()
    size: int = 0


class DecisionLog:
    """The file of decisions. It implements `answered.Watcher`.

    text        whether prompts and conversations are written, as far as they were scored
    clock       returns the time, in seconds since 1970

    Raises OSError if the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        text: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = RowFile(path, max_bytes=max_bytes)
        self._text = text
        self._clock = clock
        self._rows: queue.SimpleQueue[_Row | None] = queue.SimpleQueue()
        # Each is changed by one thread alone: rows and characters put, by the loop; taken, by the writer.
        self._put, self._put_text = 0, 0
        self._taken, self._taken_text = 0, 0
        self._failing = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def wants_text(self, request: pb.GenerateRequest, facts: RoutingRequest) -> bool:
        """See `Watcher`: the text of answers is not written."""
        return False

    def answered(self, answered: Answered) -> None:
        """Write a request that has ended."""
        facts, request = answered.facts, answered.request
        charges = [charge for _, charge in answered.bill.charges]
        cost = answered.bill.cost
        size = sum(len(turn.text) for turn in answered.turns)
        fields: dict[str, Any] = {
            "kind": records.DECISION,
            "id": uuid.uuid4().hex,
            "time": round(self._clock() - answered.seconds, 3),
            **({"tenant": facts.tenant} if facts.tenant else {}),
            "request": request.request_id,
            **({"answer": answered.answer_id} if answered.answer_id else {}),
            **({"session": facts.session} if facts.session else {}),
            "scorer": answered.scorer,
            **records.of_decision(facts, answered.score, answered.decision),
            "tier": answered.tier,
            "outcome": answered.outcome,
            "finish": answered.finish,
            "characters": size,
            "tokens": {
                "prompt": sum(charge.prompt_tokens for charge in charges),
                "cached": sum(charge.cached_tokens for charge in charges),
                "completion": sum(charge.completion_tokens for charge in charges),
                "wasted": sum(charge.wasted_tokens for charge in charges),
            },
            "cost": None if cost is None else float(f"{cost:.6g}"),
            "seconds": round(answered.seconds, 4),
        }
        self._add(_Row(fields, answered.turns, size) if self._text else _Row(fields))

    def rated(self, rating: Rating) -> None:
        """Write the outcome of an answer, and that of the shadow answer beside it."""
        outcomes = [(rating.tier, rating.quality), *([rating.shadow] if rating.shadow is not None else [])]
        for tier, quality in outcomes:
            fields = {
                "kind": records.RATING,
                "time": round(self._clock(), 3),
                **({"tenant": rating.tenant} if rating.tenant else {}),
                "request": rating.request_id,
                **({"answer": rating.answer_id} if rating.answer_id else {}),
                "tier": tier,
                "quality": quality,
                "source": rating.source,
            }
            self._add(_Row(fields))

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Write rows while the block runs; those that are waiting at its end are written as well."""
        self._loop = asyncio.get_running_loop()
        _record(0, 0)  # so that both series exist from the start
        writer = threading.Thread(target=self._write_rows, name="decision-log", daemon=True)
        writer.start()
        try:
            yield
        finally:
            self._rows.put(None)
            await asyncio.to_thread(writer.join, _STOP_SECONDS)

    def _add(self, row: _Row) -> None:
        waiting, text = self._put - self._taken, self._put_text - self._taken_text
        if waiting >= MAX_PENDING or text + row.size > MAX_PENDING_TEXT:
            metrics.DECISION_LOG_DROPPED.of().add()
            return
        self._put += 1
        self._put_text += row.size
        self._rows.put(row)

    # On the thread.

    def _write_rows(self) -> None:
        more = True
        while more:
            batch, more = self._take()
            encoded = [line for row in batch if (line := self._encode(row)) is not None]
            written = self._write(encoded)
            self._count(written, len(batch) - written)
            self._taken += len(batch)
            self._taken_text += sum(row.size for row in batch)

    def _take(self) -> tuple[list[_Row], bool]:
        """Wait for a row; return it with those behind it, and whether more may come."""
        batch: list[_Row] = []
        row = self._rows.get()
        while row is not None:
            batch.append(row)
            if len(batch) == _BATCH:
                return batch, True
            try:
                row = self._rows.get_nowait()
            except queue.Empty:
                return batch, True
        return batch, False

    def _encode(self, row: _Row) -> bytes | None:
        """Return the line of a row; None if it does not fit the file."""
        fields = {**row.fields, **row_of(row.turns)} if row.turns else row.fields
        line = (json.dumps(fields) + "\n").encode()
        return line if len(line) <= self._file.max_bytes else None

    def _write(self, lines: Sequence[bytes]) -> int:
        """Write the lines; return the number that is in the file."""
        written, failing = 0, False
        for part in _parts(lines, self._file.max_bytes):
            try:
                self._file.append(b"".join(part))
                written += len(part)
            except OSError as error:
                failing = True
                if not self._failing:  # once, not for each batch while the disk is full
                    log.error(
                        "decision log not written, rows are lost",
                        extra={"file": str(self._file.path), "problem": str(error)},
                    )
        if lines:
            if self._failing and not failing:
                log.info("decision log is written again", extra={"file": str(self._file.path)})
            self._failing = failing
        return written

    def _count(self, written: int, dropped: int) -> None:
        """Count rows, on the event loop, where metrics are recorded."""
        with suppress(RuntimeError):  # it has been closed
            if self._loop is not None and written + dropped:
                self._loop.call_soon_threadsafe(_record, written, dropped)


def _record(written: int, dropped: int) -> None:
    metrics.DECISION_LOG_ROWS.of().add(written)
    metrics.DECISION_LOG_DROPPED.of().add(dropped)


def _parts(lines: Sequence[bytes], max_bytes: int) -> list[list[bytes]]:
    """Divide lines into parts of at most *max_bytes*."""
    parts: list[list[bytes]] = []
    size = 0
    for line in lines:
        if not parts or size + len(line) > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(line)
        size += len(line)
    return parts
