"""Decide what each engine step computes: iteration-level continuous batching.

Sequences join and leave between steps (Orca, OSDI 2022) and prompts are cut into chunks that share
the step with decodes under a token budget (Sarathi-Serve, OSDI 2024), so that a long prompt does not
stall the answers around it. KV memory is handed out in blocks; when it runs out, the sequence that came
last leaves for a while and is computed again later (vLLM, SOSP 2023). Plain data and plain functions: no
clock, no thread, no torch. `kv` keeps the books of the blocks.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from headrace.worker.engine.interface import Fault, Memo, ModelInfo, Row, SamplingParams, Token
from headrace.worker.engine.plan.blocks import BlockPool, BlockTable, Key

K = TypeVar("K", bound=Hashable)

# One level of priority is worth having come this much earlier, as in the batcher's queue. So urgent
# sequences go first, and nobody waits for ever behind those who came long after.
PRIORITY_SECONDS = 10.0


class Ending(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    FAULT = "fault"


@dataclass(slots=True, eq=False)
class LiveSequence(Generic[K]):
    """One request inside the engine.

    ids         prompt and answer so far; grows
    prompt      how many of the ids are prompt
    expires     on the caller's clock, seconds; None for never
    submitted   on the caller's clock, seconds
    resumed     how many answer ids came with the request, delivered by an earlier attempt
    priority    0, the least urgent, to 9
    scope       it shares what is computed only with sequences of an equal scope; opaque
    memo        the engine's

    The rest is the scheduler's:

    rank        the lowest goes first
    table       its blocks while it runs
    computed    how many ids are in KV memory
    cached      how many of the first ids were there already, computed for another sequence
    preempted   how often it had to leave KV memory for a while
    needs       available blocks that it lacked when it was last looked at
    """

    key: K
    ids: list[int]
    prompt: int
    params: SamplingParams
    expires: float | None
    submitted: float
    resumed: int = 0
    priority: float = 5
    scope: bytes = b""
    memo: Memo = field(default_factory=Memo)
    rank: tuple[float, int] = (0.0, 0)
    table: BlockTable | None = None
    computed: int = 0
    cached: int = 0
    preempted: int = 0
    needs: int = 0
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    @property
    def answered(self) -> int:
        """Tokens of the answer, those of earlier attempts included."""
        return len(self.ids) - self.prompt


@dataclass(slots=True)
class Update(Generic[K]):
    """What a step changed for one sequence: new tokens, an ending, or both."""

    sequence: LiveSequence[K]
    offset: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ending: Ending | None = None
    fault: str = ""


class Scheduler(Generic[K]):
    """Chooses the rows of each step and books what they produced.

    model          limits: context_length, max_running, KV memory, eos_ids
    step_tokens    most tokens that one step computes; at least max_running, so that decodes always fit
    prefix_cache   whether sequences that begin alike share what is computed

    Sequences are ranked by arrival, each level of priority counting as some seconds. They start in this
    order, as soon as there is a place and KV memory for all their ids; who ranks last makes room when a
    decode finds none. Running sequences decode in every step, and prompts share what is left of its
    budget: half is for the first in rank, the other half for the shortest. So a long prompt stalls no
    short ones, nor do they stall it. Every sequence added leaves through exactly one update with an
    ending.
    """

    def __init__(self, model: ModelInfo, *, step_tokens: int = 512, prefix_cache: bool = True) -> None:
        self._model = model
        self._step_tokens = max(step_tokens, model.max_running)
        self._pool = BlockPool(model.kv_blocks, model.block_tokens, prefix_cache=prefix_cache)
        # Both by rank.
        self._waiting: list[LiveSequence[K]] = []
        self._running: list[LiveSequence[K]] = []
        self._keys: set[K] = set()
        self._leaving: dict[K, Ending] = {}
        self._planned: list[LiveSequence[K]] = []
        self._added = 0
        self.preemptions = 0  # since the start, as is the next
        self.cached_tokens = 0

    @property
    def running(self) -> int:
        """Sequences that hold KV memory."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for some."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Nothing to compute and nothing to report."""
        return not self._keys

    @property
    def uncomputed_prompt_tokens(self) -> int:
        """Tokens to compute before each sequence can draw its next one; plain decodes count as none."""
        missing = sum(len(s.ids) - s.computed for s in self._waiting)
        for sequence in self._running:
            rest = len(sequence.ids) - sequence.computed
            if rest > 1:
                missing += rest
        return missing

    @property
    def kv_tokens_free(self) -> int:
        """Tokens that KV memory has room for; what is kept only to be found again counts as room."""
        return self._pool.available * self._pool.block_tokens

    def oldest_wait(self, now: float) -> float:
        """How long the one that waits longest has waited, in seconds."""
        return max((now - s.submitted for s in self._waiting), default=0.0)

    def add(self, sequence: LiveSequence[K]) -> None:
        """Take a sequence in.

        Raises ValueError where its key is in use, where it holds an id that no token has, and where it leaves
        no room for an answer in the context: KV memory holds a whole context, so all others are sure to be
        computed.
        """
        if sequence.key in self._keys:
            raise ValueError(f"key {sequence.key!r} is in use")
        if not 0 < len(sequence.ids) < self._model.context_length:
            raise ValueError(
                f"a sequence starts with 1 to {self._model.context_length - 1} ids, not {len(sequence.ids)}"
            )
        if min(sequence.ids) < 0 or max(sequence.ids) >= self._model.vocabulary_size:
            raise ValueError(f"a sequence's ids are below {self._model.vocabulary_size}, and at least 0")
        self._keys.add(sequence.key)
        self._added += 1
        sequence.rank = (sequence.submitted - PRIORITY_SECONDS * sequence.priority, self._added)
        insort(self._waiting, sequence, key=_rank)

    def cancel(self, key: K) -> None:
        """Let a sequence leave before the next step. Unknown keys are none of our business."""
        if key in self._keys:
            self._leaving[key] = Ending.CANCELLED

    def cancel_all(self) -> None:
        """Let everything leave before the next step."""
        for key in self._keys:
            self._leaving[key] = Ending.CANCELLED

    def expel(self, now: float) -> list[Update[K]]:
        """Remove what was cancelled and what has expired at *now*; called before each `plan`.

        Returns their last updates.
        """
        for sequence in (*self._running, *self._waiting):
            if sequence.expires is not None and now >= sequence.expires:
                self._leaving.setdefault(sequence.key, Ending.DEADLINE)
        if not self._leaving:
            return []
        leaving = [s for s in (*self._running, *self._waiting) if s.key in self._leaving]
        return [self._end(sequence, self._leaving[sequence.key]) for sequence in leaving]

    def plan(self, now: float) -> list[Row]:
        """Choose the rows of the next step; empty when there is nothing to compute."""
        chosen = dict.fromkeys(self._decodes(), 1)
        self._admit()
        if len(chosen) < len(self._running):
            prefilling = [sequence for sequence in self._running if sequence not in chosen]
            for sequence, tokens in self._share(prefilling, self._step_tokens - len(chosen)):
                chosen[sequence] = tokens
                if sequence.started is None:
                    sequence.started = now
        self._planned = list(chosen)
        return [_row(sequence, tokens) for sequence, tokens in chosen.items()]

    def apply(
        self, rows: Sequence[Row], results: Sequence[Token | Fault | None], now: float
    ) -> list[Update[K]]:
        """Book what the engine made of the planned rows.

        Returns one update per sequence that has news.
        """
        updates = []
        size = self._pool.block_tokens
        for sequence, row, result in zip(self._planned, rows, results, strict=True):
            table = _table(sequence)
            if isinstance(result, Fault):
                # Whatever went wrong may have left wrong keys: nobody else shall build on them.
                table.forget()
                updates.append(self._end(sequence, Ending.FAULT, fault=result.message))
                continue
            sequence.computed = row.stop
            if row.stop >= table.settled_tokens + size:
                self._settle(sequence)
            if result is not None:
                updates.append(self._book(sequence, result, now))
        self._planned = []
        return updates

    def check(self) -> None:
        """Raise AssertionError unless the books of KV memory are right. For tests."""
        self._pool.check([_table(sequence).blocks for sequence in self._running])

    def _decodes(self) -> list[LiveSequence[K]]:
        """Give running sequences that draw a token in every step the block for it; preempts for that."""
        size, running = self._pool.block_tokens, self._running
        decoding = []
        for sequence in running.copy():
            if sequence.computed != len(sequence.ids) - 1 or sequence.table is None:
                continue
            if sequence.computed == len(sequence.table.blocks) * size:
                while not self._pool.available:
                    self._preempt(running[-1])
                if sequence.table is None:
                    break  # it was the last itself
                sequence.table.grow()
            decoding.append(sequence)
        return decoding

    def _preempt(self, sequence: LiveSequence[K]) -> None:
        """Let a running sequence wait until there is memory for it again. What it said stays said."""
        self._leave(sequence)
        sequence.computed = 0
        sequence.needs = 0
        sequence.preempted += 1
        self.preemptions += 1
        insort(self._waiting, sequence, key=_rank)

    def _admit(self) -> None:
        """Let those start for whom there is a place and memory, by rank."""
        pool = self._pool
        while self._waiting and len(self._running) < self._model.max_running:
            sequence = self._waiting[0]
            # Every running sequence will soon ask for a block: who starts shall not be preempted at once.
            spare = pool.available - min(len(self._running), pool.blocks // 16)
            if sequence.needs > spare:
                return  # without looking again, which takes time on long prompts
            found = pool.match(sequence.ids, sequence.scope)
            sequence.needs = pool.need(len(sequence.ids), found)
            if sequence.needs > spare:
                return
            sequence.table = BlockTable(pool, sequence.ids, found, sequence.scope)
            self._find(sequence, sequence.table.settled_tokens)
            del self._waiting[0]
            insort(self._running, sequence, key=_rank)

    def _share(self, prefilling: Sequence[LiveSequence[K]], room: int) -> list[tuple[LiveSequence[K], int]]:
        """Share *room* tokens among sequences whose ids are not all computed, given by rank."""
        for sequence in prefilling:
            self._settle(sequence)
        oldest = prefilling[0]
        rest: dict[LiveSequence[K], int] = {}
        computing: set[Key] = set()
        for sequence in (oldest, *sorted(prefilling[1:], key=_uncomputed)):
            # Two that go on alike do not compute the same: the second finds it done in the next step.
            key = _table(sequence).next_key(sequence.ids)
            if key is None or key not in computing:
                rest[sequence] = _uncomputed(sequence)
                if key is not None:
                    computing.add(key)
        chosen = {oldest: min(rest[oldest], (room + 1) // 2)}
        room -= chosen[oldest]
        rest[oldest] -= chosen[oldest]
        for sequence in sorted(rest, key=rest.__getitem__):
            tokens = min(rest[sequence], room)
            if tokens:
                chosen[sequence] = chosen.get(sequence, 0) + tokens
                room -= tokens
        return list(chosen.items())

    def _settle(self, sequence: LiveSequence[K]) -> None:
        """Share what it has computed, and skip what others have."""
        self._find(sequence, _table(sequence).settle(sequence.ids, sequence.computed))

    def _find(self, sequence: LiveSequence[K], computed: int) -> None:
        """Book that so many of its ids are computed, by whomever."""
        found = computed - sequence.computed
        if found:
            sequence.computed = computed
            if not sequence.preempted:  # later it finds what it has computed itself
                sequence.cached += found
                self.cached_tokens += found

    def _book(self, sequence: LiveSequence[K], result: Token, now: float) -> Update[K]:
        params = sequence.params
        if sequence.first_token is None:
            sequence.first_token = now
        sequence.last_token = now
        ended = result.id in self._model.eos_ids and not params.ignore_eos
        if ended or result.id in params.stop_ids:
            return self._end(sequence, Ending.STOP)
        update = Update(sequence, sequence.answered, [result.id])
        sequence.ids.append(result.id)
        if params.logprobs and result.logprob is not None:
            update.logprobs.append(result.logprob)
        if sequence.answered >= params.max_tokens or len(sequence.ids) >= self._model.context_length:
            update.ending = self._end(sequence, Ending.LENGTH).ending
        return update

    def _end(self, sequence: LiveSequence[K], ending: Ending, fault: str = "") -> Update[K]:
        self._keys.discard(sequence.key)
        self._leaving.pop(sequence.key, None)
        if sequence.table is None:
            self._waiting.remove(sequence)
        else:
            self._leave(sequence)
        return Update(sequence, sequence.answered, ending=ending, fault=fault)

    def _leave(self, sequence: LiveSequence[K]) -> None:
        """Give up the place in KV memory."""
        self._running.remove(sequence)
        _table(sequence).empty()
        sequence.table = None


def _rank(sequence: LiveSequence[K]) -> tuple[float, int]:
    return sequence.rank


def _uncomputed(sequence: LiveSequence[K]) -> int:
    return len(sequence.ids) - sequence.computed


def _table(sequence: LiveSequence[K]) -> BlockTable:
    """The blocks of a running sequence."""
    assert sequence.table is not None
    return sequence.table


def _row(sequence: LiveSequence[K], tokens: int) -> Row:
    stop = sequence.computed + tokens
    return Row(
        blocks=_table(sequence).blocks,
        start=sequence.computed,
        stop=stop,
        ids=sequence.ids,
        prompt=sequence.prompt,
        sample=stop == len(sequence.ids),
        params=sequence.params,
        memo=sequence.memo,
    )
