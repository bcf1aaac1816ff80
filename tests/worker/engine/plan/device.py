"""An engine that stands for an asynchronous device: steps are computed in order, when they are awaited."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from zlib import crc32

from headrace.worker.engine.echo import EOS_ID, EchoEngine
from headrace.worker.engine.interface import Fault, Grammars, Memo, ModelInfo, Result, Row, Token
from tests.worker.engine.plan.scheduling import ON_PURPOSE


def hashed(ids: Sequence[int], *, may_end: bool) -> int:
    """Return a token that depends on all ids before it; one in eight ends the turn if it may."""
    noise = (crc32(repr(list(ids)).encode()) * 0x9E3779B1) >> 16 & 0xFFFF
    return EOS_ID if may_end and noise % 8 == 0 else noise % 250


class HashEngine(EchoEngine):
    """The echo engine with tokens that depend on the whole history. It checks the contents of blocks, too."""

    def step(self, rows: Sequence[Row]) -> list[Result]:
        return [
            replace(result, id=hashed(row.ids[: row.stop], may_end=not row.params.ignore_eos))
            if isinstance(result, Token)
            else result
            for row, result in zip(rows, super().step(rows), strict=True)
        ]

    def lose(self, block: int) -> None:
        """Lose the contents of a block: a row that reads it is rejected from now on."""
        self._memory.pop(block, None)
        self._digests.pop(block, None)


@dataclass
class DeviceEngine:
    """Computes what *inner* computes, one step ahead of the caller, and checks the caller's side.

    failing    steps that raise when they are awaited, numbered from 0; the blocks that they write are lost
    faulty     (step, row) of rows that cannot be sampled
    """

    inner: EchoEngine
    failing: frozenset[int] = frozenset()
    faulty: frozenset[tuple[int, int]] = frozenset()
    ahead: int = 1
    launched: int = 0
    _queue: deque[DeviceStep] = field(default_factory=deque)
    _tables: dict[int, tuple[Memo, list[int]]] = field(default_factory=dict)
    latest: dict[Memo, int] = field(default_factory=dict)
    broken: set[Memo] = field(default_factory=set)

    @property
    def model(self) -> ModelInfo:
        """The inner engine's."""
        return self.inner.model

    @property
    def grammars(self) -> Grammars | None:
        """The inner engine's."""
        return self.inner.grammars

    def launch(self, rows: Sequence[Row]) -> DeviceStep:
        """Copy the rows as they are now, because a device reads its inputs at the launch."""
        assert len(self._queue) <= self.ahead, "too many steps are in flight"
        before = {row.memo: row for row in self._queue[-1].rows} if self._queue else {}
        for row in rows:
            assert row.memo not in self.broken, "the sequence has failed already"
            if row.pending:
                last = before[row.memo]
                assert (last.sample, last.stop) == (True, row.start), "it does not continue the last step"
                assert (row.start, row.stop) == (len(row.ids), len(row.ids) + 1)
            else:
                assert row.stop <= len(row.ids)
            assert row.sample == (row.stop == len(row.ids) + row.pending)
            memo, blocks = self._tables.get(row.version, (row.memo, []))
            assert memo is row.memo, "two tables have the same version"
            assert row.blocks[: len(blocks)] == blocks, "the table has changed, but not its version"
            self._tables[row.version] = memo, list(row.blocks)
        copied = [replace(row, blocks=list(row.blocks), ids=list(row.ids)) for row in rows]
        self._queue.append(DeviceStep(self, self.launched, copied))
        self.launched += 1
        return self._queue[-1]

    def compute(self, step: DeviceStep) -> list[Result]:
        """Compute the oldest step."""
        assert self._queue.popleft() is step, "steps are awaited in order"
        # What a row computes after its sequence has failed is dropped by the caller.
        valid = [row for row in step.rows if row.memo not in self.broken]
        for row in valid:
            if row.pending:
                row.ids, row.pending = [*row.ids, self.latest[row.memo]], False
        results = iter(self.inner.step(valid))
        found = [Token(0) if row.memo in self.broken else next(results) for row in step.rows]
        for index, row in enumerate(step.rows):
            if (step.number, index) in self.faulty:
                found[index] = Fault(ON_PURPOSE)
            result = found[index]
            if isinstance(result, Fault):
                self.broken.add(row.memo)
            elif isinstance(result, Token):
                self.latest[row.memo] = result.id
        if step.number in self.failing:
            self._lose(step.rows)
            raise RuntimeError(ON_PURPOSE)
        return found

    def _lose(self, rows: Sequence[Row]) -> None:
        """Forget the blocks that the rows write: the inner engine then rejects rows that read them."""
        size = self.model.block_tokens
        for row in rows:
            self.broken.add(row.memo)
            for block in row.blocks[row.start // size : (row.stop - 1) // size + 1]:
                assert isinstance(self.inner, HashEngine)
                self.inner.lose(block)


@dataclass(frozen=True, eq=False)
class DeviceStep:
    """A launched step: copies of its rows."""

    engine: DeviceEngine
    number: int
    rows: list[Row]

    def wait(self) -> list[Result]:
        """See `LaunchedStep.wait`."""
        return self.engine.compute(self)
