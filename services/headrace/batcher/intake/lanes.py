"""Queue the work that requests need before they enter the batcher's queue, and do it on threads.

Most of it is tokenising: there are lanes for prompts of different sizes. Another lane checks grammars.

The order is that of the queue (`order`): priority, tenants in turn, earliest deadline. Each lane has its own
order and threads, and accepts requests of one range of sizes. So a short pending never waits for a long one,
nor a long one for one that is many times longer. What happens to the tokens is decided in `intake`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from headrace import errors
from headrace.batcher.waiting.estimates import RunningMean
from headrace.batcher.waiting.order import FairOrder
from headrace.deadline import Deadline, response_deadline
from headrace.metrics import catalogue
from headrace.metrics.words import Outcome, outcome_of

_BYTES_PER_TOKEN = 4  # of ordinary text
# The fixed cost of a request, as tokens: half a millisecond, the time of a kilobyte of a long pending.
_FIXED_COST = 256

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Pending(Generic[T]):
    """The work of a request that waits in a lane. See `order.Waiting`.

    work     called on a thread
    size     bytes of the request, or of the part of it that the work is about
    result   what the work returns or raises; set while it is in a lane
    """

    work: Callable[[], T]
    size: int
    tenant: str
    priority: int
    arrived: float
    deadline: Deadline
    result: asyncio.Future[T] = field(init=False)

    @property
    def cost(self) -> int:
        """The cost of the work, in tokens of ordinary text."""
        return self.size // _BYTES_PER_TOKEN + _FIXED_COST

    @property
    def uncached(self) -> int:
        """The same as `cost`: it is not known yet how much workers have cached."""
        return self.cost

    @property
    def response_deadline(self) -> Deadline:
        """See `deadline.response_deadline`."""
        return response_deadline(self.deadline)

    async def wait(self, late: errors.DeadlineExceeded) -> T:
        """Wait for the result, until the deadline of the response at most; then raise *late*."""
        try:
            async with asyncio.timeout_at(self.response_deadline.timeout_at) as timeout:
                return await self.result
        except TimeoutError:
            if not timeout.expired():
                raise
            raise late from None

    def fail(self, error: errors.HeadraceError) -> None:
        """End it with *error*."""
        if not self.result.done():
            self.result.set_exception(error)


class Lane:
    """Works on requests of at least *smallest* bytes, *threads* at a time. Use as a context manager.

    ageing   as of `order.FairOrder`
    tier     its name, for metrics of waiting requests; empty: there are none, because others wait here
    stage    what they wait for, in these metrics
    """

    def __init__(
        self, *, smallest: int, threads: int, ageing: float, tier: str = "", stage: str = "tokenizer"
    ) -> None:
        # The quantum covers one of the shortest prompts of the lane, or a few tiny ones. A pending that is n
        # times longer takes n rounds, which must be few.
        quantum = max(smallest // _BYTES_PER_TOKEN, 4 * _FIXED_COST)
        self.order: FairOrder[Pending[Any]] = FairOrder(ageing=ageing, quantum=quantum)
        self.smallest = smallest
        self.bytes = 0
        self._threads = threads
        self._tier = tier
        self._stage = stage
        self._depth = catalogue.QUEUE_DEPTH.of(tier=tier, stage=stage) if tier else None
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=stage)
        self._held: set[Pending[Any]] = set()
        self._running: dict[Pending[Any], float] = {}  # and when each started
        self._seconds = RunningMean()

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()

    @property
    def waiting(self) -> int:
        """The requests that hold a place here: until they enter the batcher's queue or leave."""
        return len(self._held)

    @property
    def empty(self) -> bool:
        """Whether no request waits here for a thread; some may be on one."""
        return not self.order

    def by_level(self) -> dict[int, list[Pending[Any]]]:
        """See `admission.WaitingPlace`: those that are not on a thread yet."""
        return self.order.by_level()

    def wait_seconds(self, newcomer: Pending[Any]) -> float:
        """Estimate how long *newcomer* would wait for its result, from previous ones; 0 while unknown."""
        ahead, _ = self.order.ahead_of(newcomer)
        return self._seconds_behind(ahead)

    @property
    def longest_wait_seconds(self) -> float:
        """Estimate how long a newcomer waits if all others are ahead, which needs no search through them."""
        return self._seconds_behind(len(self.order))

    def _seconds_behind(self, ahead: int) -> float:
        if len(self._running) < self._threads:
            return 0.0
        return (ahead + 1) / self._threads * self._seconds.value

    def put(self, pending: Pending[Any]) -> None:
        """Queue *pending*, whose `result` follows. It holds a place until `leave` is called."""
        pending.result = asyncio.get_running_loop().create_future()
        self._held.add(pending)
        self.bytes += pending.size
        if self._depth is not None:
            self._depth.add(1)
        self.order.put(pending)
        self._fill()

    def remove(self, waiting: Pending[Any], outcome: Outcome) -> bool:
        """See `admission.WaitingPlace`."""
        if waiting not in self.order:
            return False
        self.leave(waiting, outcome)
        return True

    def leave(self, pending: Pending[Any], outcome: Outcome) -> None:
        """Release the place of *pending*, waiting or running. Further calls have no effect."""
        if pending not in self._held:
            return
        self._held.discard(pending)
        self.order.discard(pending)
        if pending not in self._running:
            self.bytes -= pending.size
        if self._depth is not None:
            self._depth.add(-1)
            wait = catalogue.QUEUE_WAIT.of(tier=self._tier, stage=self._stage, outcome=outcome)
            wait.record(time.monotonic() - pending.arrived)

    def _fill(self) -> None:
        """Start the next prompts on free threads."""
        now = time.monotonic()
        while len(self._running) < self._threads and (pending := self.order.head(now)) is not None:
            self.order.take(pending)
            self._running[pending] = now
            task = asyncio.get_running_loop().run_in_executor(self._executor, pending.work)
            task.add_done_callback(partial(self._done, pending))

    def _done(self, pending: Pending[Any], task: asyncio.Future[Any]) -> None:
        self._seconds.add(time.monotonic() - self._running.pop(pending))
        if pending not in self._held:
            self.bytes -= pending.size  # its caller left, but the thread could not be stopped
        error = task.exception()
        if not pending.result.done():
            if error is None:
                pending.result.set_result(task.result())
            else:
                pending.result.set_exception(error)
        self._fill()


def outcome_after(error: BaseException) -> Outcome:
    """Return how the wait of a request ended that left with *error*."""
    if isinstance(error, errors.HeadraceError):
        return outcome_of(type(error))
    return "failed" if isinstance(error, Exception) else "cancelled"
