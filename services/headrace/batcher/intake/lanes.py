"""Let requests wait for their turn to be tokenised, and tokenise them on threads of their size.

Who is next is the order of `queue`: priority, tenants in turn, earliest deadline. A lane has its own queue
and threads and takes requests of one range of sizes, so a short prompt never waits for a long one, nor a long
one for one that is many times as long. What tokenising is, and what follows, is `intake`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from headrace import attributes, errors
from headrace.batcher import job as jobs
from headrace.batcher.waiting.estimates import Mean
from headrace.batcher.waiting.line import queue_depth, queue_wait
from headrace.batcher.waiting.queue import JobQueue

_BYTES_PER_TOKEN = 4  # of ordinary text
# What each request costs besides, as tokens: half a millisecond, the time of a kilobyte of a long prompt.
_EACH = 256


@dataclass(slots=True, eq=False)
class Entry:
    """A request at the intake. See `queue.Waiting`.

    encode   makes its tokens; called on a thread
    size     bytes of the request
    ids      its tokens, or why there are none
    """

    encode: Callable[[], list[int]]
    size: int
    tenant: str
    priority: int
    arrived: float
    expires: float | None
    ids: asyncio.Future[list[int]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def cost(self) -> int:
        """What tokenising it takes, in tokens of ordinary text."""
        return self.size // _BYTES_PER_TOKEN + _EACH

    @property
    def uncached(self) -> int:
        """As `cost`: what workers hold of it is not known yet."""
        return self.cost

    @property
    def answer_by(self) -> float | None:
        """See `job.answer_by`."""
        return jobs.answer_by(self.expires)

    def fail(self, error: errors.HeadraceError) -> None:
        """End it with *error*."""
        if not self.ids.done():
            self.ids.set_exception(error)


class Lane:
    """Tokenises requests of at least *smallest* bytes, *threads* at a time. Use as a context manager.

    limit    most requests that wait in the batcher, as of `queue`
    ageing   as of `queue`
    labels   attributes of metrics
    """

    def __init__(
        self, *, smallest: int, threads: int, limit: int, ageing: float, labels: dict[str, str]
    ) -> None:
        # A tenant's turn is one of the shortest prompts of the lane, or a few where those are tiny: longer
        # ones are saved up for in as many rounds as they are longer, which must be few.
        quantum = max(smallest // _BYTES_PER_TOKEN, 4 * _EACH)
        self.queue: JobQueue[Entry] = JobQueue(limit, ageing=ageing, quantum=quantum)
        self.smallest = smallest
        self.bytes = 0
        self._threads = threads
        self._labels = {**labels, attributes.QUEUE_STAGE: "tokenizer"}
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
        self._held: set[Entry] = set()
        self._running: dict[Entry, float] = {}  # since when
        self._seconds = Mean()

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()

    @property
    def waiting(self) -> int:
        """Requests that have a place here: until they have one in the batcher's queue, or left."""
        return len(self._held)

    def wait_seconds(self, newcomer: Entry) -> float:
        """How long *newcomer* would wait for its tokens, by the mean of those before; 0 while unknown."""
        if len(self._running) < self._threads:
            return 0.0
        ahead, _ = self.queue.ahead_of(newcomer)
        return (ahead + 1) / self._threads * self._seconds.value

    def put(self, entry: Entry) -> None:
        """Let *entry* wait for its turn; its tokens come as `entry.ids`. It holds a place until it leaves."""
        self._held.add(entry)
        self.bytes += entry.size
        queue_depth.add(1, self._labels)
        self.queue.put(entry)
        self._fill()

    def remove(self, waiting: Entry, outcome: str) -> bool:
        """See `admission.Places`."""
        if waiting not in self.queue:
            return False
        self.leave(waiting, outcome)
        return True

    def leave(self, entry: Entry, outcome: str) -> None:
        """Give the place of *entry* back, wherever it is; again does no harm."""
        if entry not in self._held:
            return
        self._held.discard(entry)
        self.queue.discard(entry)
        if entry not in self._running:
            self.bytes -= entry.size
        queue_depth.add(-1, self._labels)
        queue_wait.record(time.monotonic() - entry.arrived, {**self._labels, attributes.OUTCOME: outcome})

    def _fill(self) -> None:
        """Give free threads something to do."""
        now = time.monotonic()
        while len(self._running) < self._threads and (entry := self.queue.head(now)) is not None:
            self.queue.take(entry)
            self._running[entry] = now
            task = asyncio.get_running_loop().run_in_executor(self._executor, entry.encode)
            task.add_done_callback(partial(self._done, entry))

    def _done(self, entry: Entry, task: asyncio.Future[list[int]]) -> None:
        self._seconds.add(time.monotonic() - self._running.pop(entry))
        if entry not in self._held:
            self.bytes -= entry.size  # its caller left, the thread could not
        error = task.exception()
        if not entry.ids.done():
            if error is None:
                entry.ids.set_result(task.result())
            else:
                entry.ids.set_exception(error)
        self._fill()
