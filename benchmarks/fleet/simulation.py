"""Simulate a mesh step by step: Poisson arrivals, routers, batchers, and workers that batch continuously.

Router and batcher processes are single servers, whose work on each request, message and token takes the CPU
time that `costs` measured. A worker computes steps: each one decodes a token of all its sequences, and
prefills the prompts that were given to it since the step before. A batcher learns that a slot is free when it
has processed the message of that step. While a process is behind, the messages that one sender has for it are
gathered into one, as the senders of streams do.

Not simulated: chunked prefill, limits of queues, and the network.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from headrace.cli.bench.latencies import percentile


@dataclass(frozen=True)
class Costs:
    """CPU seconds of a process: for a request, for the message of a worker's step, for a token in it."""

    request: float = 0.0
    message: float = 0.0
    token: float = 0.0

    def cores(self, requests: float, messages: float, tokens: float) -> float:
        """Return the busy cores at these rates per second."""
        return self.request * requests + self.message * messages + self.token * tokens


@dataclass(frozen=True)
class Engine:
    """How long a worker's step takes, and how many sequences it runs at a time."""

    slots: int
    step: float
    row: float = 0.0
    prompt_token: float = 0.0

    def seconds(self, rows: int, prompt_tokens: int) -> float:
        """Return the time of a step that decodes *rows* tokens and prefills *prompt_tokens*."""
        return self.step + self.row * rows + self.prompt_token * prompt_tokens


@dataclass(frozen=True)
class Load:
    """Requests per second, tokens of each prompt, and a function that draws the tokens of an answer."""

    rate: float
    prompt: int
    answer: Callable[[random.Random], int]


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The simulated processes.

    divided   whether each batcher has workers of its own; otherwise all batchers use all workers
    """

    workers: int
    engine: Engine
    batchers: int = 1
    routers: int = 1
    divided: bool = False
    batcher: Costs = Costs()
    router: Costs = Costs()


@dataclass(frozen=True)
class Outcome:
    """What was simulated, without the warm-up.

    waits            seconds in the batcher's queue, of each request
    ttfts            seconds to the first token, of each request
    tpots            seconds per token after the first, of each request
    tokens_per_s     delivered
    running          mean share of the slots that were in use
    batcher_busy, router_busy   work that arrived at one process, as a share of a core: 1 is saturated
    left             requests that were waiting in the batchers' queues at the end
    """

    waits: Sequence[float]
    ttfts: Sequence[float]
    tpots: Sequence[float]
    tokens_per_s: float
    running: float
    batcher_busy: float
    router_busy: float
    left: int

    def ttft(self, percent: float) -> float:
        """Return a percentile of the time to the first token; infinite if nothing was answered."""
        return percentile(self.ttfts, percent) if self.ttfts else math.inf

    def tpot(self, percent: float) -> float:
        """Return a percentile of the time per token; infinite if nothing was answered."""
        return percentile(self.tpots, percent) if self.tpots else math.inf


@dataclass(slots=True)
class _Request:
    """A request: which router and batcher it uses, and how far its answer is.

    wanted     tokens of the answer
    computed   tokens that the worker has computed
    """

    router: int
    batcher: int
    arrived: float
    wanted: int
    computed: int = 0
    queued: float = 0.0
    wait: float = 0.0
    first: float = 0.0


@dataclass(slots=True)
class _Message:
    """Tokens on their way: the request, and the place of the token in its answer, from 1."""

    starts: float
    tokens: list[tuple[_Request, int]]


@dataclass(slots=True)
class _Server:
    """One process: works on one thing after another."""

    costs: Costs
    free: float = 0.0
    busy: float = 0.0
    waiting: dict[int, _Message] = field(default_factory=dict)  # the last message, by sender

    def serve(self, now: float, seconds: float) -> float:
        """Return when work that arrives *now* is done."""
        self.free = max(now, self.free) + seconds
        self.busy += seconds
        return self.free

    def receive(self, now: float, sender: int, tokens: list[tuple[_Request, int]]) -> _Message | None:
        """Return the message that these tokens are sent in; None if they join one that is not yet read.

        A message is read completely when the process is free the next time; see `free`.
        """
        last = self.waiting.get(sender)
        if last is not None and last.starts > now:
            last.tokens += tokens
            self.serve(now, self.costs.token * len(tokens))
            return None
        message = self.waiting[sender] = _Message(max(now, self.free), tokens)
        self.serve(now, self.costs.message + self.costs.token * len(tokens))
        return message


@dataclass(slots=True)
class _Worker:
    number: int
    pool: int
    joining: list[_Request] = field(default_factory=list)
    rows: list[_Request] = field(default_factory=list)
    taken: int = 0  # slots, as the batchers know it
    stepping: bool = False


class _Simulation:
    """The state; each event is a time and a function that is called then."""

    def __init__(self, mesh: Mesh, load: Load, seed: int) -> None:
        self._mesh, self._load, self._random = mesh, load, random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.now = 0.0
        self.routers = [_Server(mesh.router) for _ in range(mesh.routers)]
        self.batchers = [_Server(mesh.batcher) for _ in range(mesh.batchers)]
        # A pool is what one queue of requests is dispatched to.
        pools = mesh.batchers if mesh.divided else 1
        workers = [_Worker(number, number % pools) for number in range(mesh.workers)]
        self._pools = [workers[pool::pools] for pool in range(pools)]
        self.queues: list[deque[_Request]] = [deque() for _ in self._pools]
        self.done: list[tuple[_Request, float]] = []  # with the time of the last token
        self.delivered = 0
        self.slot_seconds = 0.0
        self._numbers = itertools.count()

    def run(self, until: float) -> None:
        """Compute all events up to a time."""
        while self._events and self._events[0][0] <= until:
            self.now, _, call = heapq.heappop(self._events)
            call()
        self.now = until

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), call))

    def arrive(self) -> None:
        """Let a request arrive now, and the next one later."""
        self.at(self.now + self._random.expovariate(self._load.rate), self.arrive)
        number = next(self._numbers)
        turn, router = divmod(number, len(self.routers))
        batcher = turn % len(self.batchers)
        request = _Request(router, batcher, self.now, self._load.answer(self._random))
        passed_on = self.routers[router].serve(self.now, self._mesh.router.request)
        self.at(passed_on, partial(self._at_batcher, request))

    def _at_batcher(self, request: _Request) -> None:
        queued = self.batchers[request.batcher].serve(self.now, self._mesh.batcher.request)
        self.at(queued, partial(self._enqueue, request))

    def _enqueue(self, request: _Request) -> None:
        request.queued = self.now
        pool = request.batcher % len(self._pools)
        self.queues[pool].append(request)
        self._dispatch(pool)

    def _dispatch(self, pool: int) -> None:
        queue, workers = self.queues[pool], self._pools[pool]
        while queue:
            worker = min(workers, key=lambda worker: worker.taken)
            if worker.taken >= self._mesh.engine.slots:
                return
            request = queue.popleft()
            request.wait = self.now - request.queued
            worker.taken += 1
            worker.joining.append(request)
            if not worker.stepping:
                self._step(worker)

    def _step(self, worker: _Worker) -> None:
        prompts = self._load.prompt * len(worker.joining)
        decodes = len(worker.rows)
        worker.rows += worker.joining
        worker.joining = []
        worker.stepping = bool(worker.rows)
        if worker.rows:
            seconds = self._mesh.engine.seconds(decodes, prompts)
            self.slot_seconds += seconds * len(worker.rows)
            self.at(self.now + seconds, partial(self._stepped, worker))

    def _stepped(self, worker: _Worker) -> None:
        tokens = []
        for request in worker.rows:
            request.computed += 1
            tokens.append((request, request.computed))
        for number, own in _grouped(tokens, lambda request: request.batcher).items():
            batcher = self.batchers[number]
            if message := batcher.receive(self.now, worker.number, own):
                self.at(batcher.free, partial(self._passed_on, worker, number, message))
        worker.rows = [request for request in worker.rows if request.computed < request.wanted]
        self._step(worker)

    def _passed_on(self, worker: _Worker, batcher: int, message: _Message) -> None:
        if ended := sum(place == request.wanted for request, place in message.tokens):
            worker.taken -= ended
            self._dispatch(worker.pool)
        for number, own in _grouped(message.tokens, lambda request: request.router).items():
            router = self.routers[number]
            if passed := router.receive(self.now, batcher, own):
                self.at(router.free, partial(self._deliver, passed))

    def _deliver(self, message: _Message) -> None:
        self.delivered += len(message.tokens)
        for request, place in message.tokens:
            if place == 1:
                request.first = self.now
            if place == request.wanted:
                self.done.append((request, self.now))


def _grouped(
    tokens: Sequence[tuple[_Request, int]], key: Callable[[_Request], int]
) -> dict[int, list[tuple[_Request, int]]]:
    groups: dict[int, list[tuple[_Request, int]]] = {}
    for token in tokens:
        groups.setdefault(key(token[0]), []).append(token)
    return groups


def simulate(mesh: Mesh, load: Load, *, seconds: float, warm_up: float = 0.0, seed: int = 1) -> Outcome:
    """Simulate *seconds* after a warm-up, which is not counted. The same seed gives the same arrivals."""
    state = _Simulation(mesh, load, seed)
    state.at(0.0, state.arrive)
    state.run(warm_up)
    before = len(state.done), state.delivered, state.slot_seconds
    busy = [sum(server.busy for server in kind) for kind in (state.batchers, state.routers)]
    state.run(warm_up + seconds)
    done = state.done[before[0] :]
    batcher, router = (
        (sum(server.busy for server in kind) - earlier) / len(kind) / seconds
        for kind, earlier in zip((state.batchers, state.routers), busy, strict=True)
    )
    return Outcome(
        waits=[request.wait for request, _ in done],
        ttfts=[request.first - request.arrived for request, _ in done],
        tpots=[(last - request.first) / (request.wanted - 1) for request, last in done if request.wanted > 1],
        tokens_per_s=(state.delivered - before[1]) / seconds,
        running=(state.slot_seconds - before[2]) / seconds / mesh.workers / mesh.engine.slots,
        batcher_busy=batcher,
        router_busy=router,
        left=sum(map(len, state.queues)),
    )
