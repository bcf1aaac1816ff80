"""Queue prompts to be tokenised, and tokenise them on threads for their size.

The order is that of the queue (`order`): priority, tenants in turn, earliest deadline. Each lane has its own
order and threads, and accepts requests of one range of sizes. So a short prompt never waits for a long one,
nor a long one for one that is many times longer. What happens to the tokens is decided in `intake`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from headrace import errors
from headrace.batcher import job as jobs
from headrace.batcher.waiting.estimates import RunningMean
from headrace.batcher.waiting.order import FairOrder
from headrace.deadline import Deadline
from headrace.metrics import catalogue
from headrace.metrics.words import Outcome, outcome_of

_BYTES_PER_TOKEN = 4  # of ordinary text
# The fixed cost of a request, as tokens: half a millisecond, the time of a kilobyte of a long prompt.
_FIXED_COST = 256


@dataclass(slots=True, eq=False)
class PendingPrompt:
    """A request that waits to be tokenised. See `order.Waiting`.

    encode   returns its tokens; called on a thread
    size     bytes of the request
    ids      its tokens, or why there are none; set while it is in a lane
    """

    encode: Callable[[], list[int]]
    size: int
    tenant: str
    priority: int
    arrived: float
    deadline: Deadline
    ids: asyncio.Future[list[int]] = field(init=False)

    @property
    def cost(self) -> int:
        """The cost of tokenising it, in tokens of ordinary text."""
        return self.size // _BYTES_PER_TOKEN + _FIXED_COST

    @property
    def uncached(self) -> int:
        """The same as `cost`: it is not known yet how much workers have cached."""
        return self.cost

    @property
    def response_deadline(self) -> Deadline:
        """See `job.response_deadline`."""
        return jobs.response_deadline(self.deadline)

    def fail(self, error: errors.HeadraceError) -> None:
        """End it with *error*."""
        if not self.ids.done():
            self.ids.set_exception(error)


class Lane:
    """Tokenises requests of at least *smallest* bytes, *threads* at a time. Use as a context manager.

    ageing   as of `order.FairOrder`
    tier     its name, for metrics of waiting requests; empty: there are none, because others wait here
    """

    def __init__(self, *, smallest: int, threads: int, ageing: float, tier: str = "") -> None:
        # The quantum covers one of the shortest prompts of the lane, or a few tiny ones. A prompt that is n
        # times longer takes n rounds, which must be few.
        quantum = max(smallest // _BYTES_PER_TOKEN, 4 * _FIXED_COST)
        self.order: FairOrder[PendingPrompt] = FairOrder(ageing=ageing, quantum=quantum)
        self.smallest = smallest
        self.bytes = 0
        self._threads = threads
        self._tier = tier
        self._depth = catalogue.QUEUE_DEPTH.of(tier=tier, stage="tokenizer") if tier else None
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
        self._held: set[PendingPrompt] = set()
        self._running: dict[PendingPrompt, float] = {}  # and when each started
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

    def by_level(self) -> dict[int, list[PendingPrompt]]:
        """See `admission.WaitingPlace`: those that are not on a thread yet."""
        return self.order.by_level()

    def wait_seconds(self, newcomer: PendingPrompt) -> float:
        """Estimate how long *newcomer* would wait for its tokens, from previous ones; 0 while unknown."""
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

    def put(self, prompt: PendingPrompt) -> None:
        """Queue *prompt*, whose tokens will be in `prompt.ids`. It holds a place until `leave` is called."""
        prompt.ids = asyncio.get_running_loop().create_future()
        self._held.add(prompt)
        self.bytes += prompt.size
        if self._depth is not None:
            self._depth.add(1)
        self.order.put(prompt)
        self._fill()

    def remove(self, waiting: PendingPrompt, outcome: Outcome) -> bool:
        """See `admission.WaitingPlace`."""
        if waiting not in self.order:
            return False
        self.leave(waiting, outcome)
        return True

    def leave(self, prompt: PendingPrompt, outcome: Outcome) -> None:
        """Release the place of *prompt*, waiting or running. Further calls have no effect."""
        if prompt not in self._held:
            return
        self._held.discard(prompt)
        self.order.discard(prompt)
        if prompt not in self._running:
            self.bytes -= prompt.size
        if self._depth is not None:
            self._depth.add(-1)
            wait = catalogue.QUEUE_WAIT.of(tier=self._tier, stage="tokenizer", outcome=outcome)
            wait.record(time.monotonic() - prompt.arrived)

    def _fill(self) -> None:
        """Start the next prompts on free threads."""
        now = time.monotonic()
        while len(self._running) < self._threads and (prompt := self.order.head(now)) is not None:
            self.order.take(prompt)
            self._running[prompt] = now
            task = asyncio.get_running_loop().run_in_executor(self._executor, prompt.encode)
            task.add_done_callback(partial(self._done, prompt))

    def _done(self, prompt: PendingPrompt, task: asyncio.Future[list[int]]) -> None:
        self._seconds.add(time.monotonic() - self._running.pop(prompt))
        if prompt not in self._held:
            self.bytes -= prompt.size  # its caller left, but the thread could not be stopped
        error = task.exception()
        if not prompt.ids.done():
            if error is None:
                prompt.ids.set_result(task.result())
            else:
                prompt.ids.set_exception(error)
        self._fill()


def outcome_after(error: BaseException) -> Outcome:
    """Return how the wait of a request ended that left with *error*."""
    if isinstance(error, errors.HeadraceError):
        return outcome_of(type(error))
    return "failed" if isinstance(error, Exception) else "cancelled"
