"""Decide what each engine step computes: iteration-level continuous batching.

Sequences join and leave between steps (Orca, OSDI 2022). Prompts are computed in chunks that share a step
with decodes under a token budget (Sarathi-Serve, OSDI 2024), so that a long prompt does not stall the
answers around it. KV memory is allocated in blocks; when it runs out, the sequence that came last is
preempted and recomputed later (vLLM, SOSP 2023). Plain data and plain functions: no clock, no thread, no
torch. `blocks` does the accounting of the blocks.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic

from headrace.worker.engine.interface import Fault, Memo, ModelInfo, Row, Token
from headrace.worker.engine.plan.blocks import BlockKey, BlockPool, BlockTable
from headrace.worker.runner import FinishReason, K, SequenceSpec, SequenceTimes, SequenceUpdate

# One level of priority counts as an arrival this much earlier, as in the batcher's queue. So urgent
# sequences go first, and no sequence starves behind those that arrive long after it.
PRIORITY_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class LiveSequence(Generic[K]):
    """A sequence inside the scheduler.

    ids         prompt and answer so far; grows
    rank        the lowest goes first
    length      number of ids at which it ends
    ends        tokens that end it
    memo        the engine's
    table       its blocks while it runs
    computed    number of ids in KV memory
    cached      number of ids that the prefix cache held, computed for another sequence
    preempted   number of times it was preempted
    needs       available blocks that it would use up, when it was last considered; 0 before
    started, first_token, last_token   see `SequenceTimes`
    """

    spec: SequenceSpec[K]
    ids: list[int]
    rank: tuple[float, int]
    length: int
    ends: frozenset[int]
    memo: Memo = field(default_factory=Memo)
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
        """Number of answer tokens, including those of earlier attempts."""
        return len(self.ids) - self.spec.prompt


class Scheduler(Generic[K]):
    """Chooses the rows of each step and records their results.

    model          limits: context_length, max_running, KV memory, eos_ids
    step_tokens    most tokens that one step computes; at least max_running, so that decodes always fit
    prefix_cache   whether sequences with a common prefix share what is computed

    Sequences are ranked by arrival; each level of priority counts as some seconds. They start in this order,
    as soon as there is a free slot and KV memory for all their ids. If a decode needs a block and none is
    available, the sequence with the last rank is preempted. Running sequences decode in every step, and
    prompts share the rest of its budget: half is for the first in rank, the other half for the shortest. So
    a long prompt does not stall short ones, and short ones do not stall it. Every sequence added leaves
    through exactly one update with a finish reason.

    step_tokens     as given, but at least max_running
    tokens          ids that the last planned step computes
    decodes         tokens of the last step that continued an answer
    preemptions     since the start
    cached_tokens   ids that the prefix cache held, since the start
    """

    def __init__(self, model: ModelInfo, *, step_tokens: int = 512, prefix_cache: bool = True) -> None:
        self._model = model
        self.step_tokens = max(step_tokens, model.max_running)
        self._pool = BlockPool(model.kv_blocks, model.block_tokens, prefix_cache=prefix_cache)
        # Both by rank.
        self._waiting: list[LiveSequence[K]] = []
        self._running: list[LiveSequence[K]] = []
        self._keys: set[K] = set()
        self._leaving: dict[K, FinishReason] = {}
        self._planned: list[LiveSequence[K]] = []
        # Those of the running sequences that did not decode in the last step.
        self._prefilling: list[LiveSequence[K]] = []
        self._first_deadline = math.inf  # no sequence's deadline is earlier
        self._added = 0
        self.tokens = 0
        self.decodes = 0
        self.preemptions = 0
        self.cached_tokens = 0

    @property
    def running(self) -> int:
        """Number of sequences that have KV memory."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of sequences that wait for KV memory."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute and nothing to report."""
        return not self._keys

    @property
    def uncomputed_prompt_tokens(self) -> int:
        """Tokens to compute before each sequence can sample its next one; plain decodes count as none."""
        missing = sum(len(s.ids) - s.computed for s in self._waiting)
        for sequence in self._prefilling:
            rest = len(sequence.ids) - sequence.computed
            if rest > 1 and sequence.table is not None:
                missing += rest
        return missing

    @property
    def kv_tokens_free(self) -> int:
        """Free capacity of KV memory in tokens; cached blocks that no sequence uses count as free."""
        return self._pool.available * self._pool.block_tokens

    def oldest_wait(self, now: float) -> float:
        """Return how long the longest-waiting sequence has waited, in seconds."""
        return max((now - s.spec.submitted for s in self._waiting), default=0.0)

    def add(self, spec: SequenceSpec[K]) -> LiveSequence[K]:
        """Add a sequence.

        Raises ValueError if its key is in use, if it contains an id outside the vocabulary, and if it leaves
        no room for an answer in the context. KV memory holds a whole context, so every other sequence can be
        computed.
        """
        if spec.key in self._keys:
            raise ValueError(f"key {spec.key!r} is in use")
        if not 0 < len(spec.ids) < self._model.context_length:
            raise ValueError(
                f"a sequence starts with 1 to {self._model.context_length - 1} ids, not {len(spec.ids)}"
            )
        if min(spec.ids) < 0 or max(spec.ids) >= self._model.vocabulary_size:
            raise ValueError(f"a sequence's ids must be in 0 to {self._model.vocabulary_size - 1}")
        self._keys.add(spec.key)
        self._added += 1
        self._first_deadline = min(self._first_deadline, spec.deadline.at)
        params = spec.params
        sequence = LiveSequence(
            spec,
            list(spec.ids),
            rank=(spec.submitted - PRIORITY_SECONDS * spec.priority, self._added),
            length=min(spec.prompt + params.max_tokens, self._model.context_length),
            ends=params.stop_ids if params.ignore_eos else params.stop_ids | self._model.eos_ids,
        )
        insort(self._waiting, sequence, key=_rank)
        return sequence

    def cancel(self, keys: Iterable[K]) -> None:
        """Let sequences end before the next step. Unknown keys are ignored."""
        for key in keys:
            if key in self._keys:
                self._leaving[key] = FinishReason.CANCELLED

    def cancel_all(self) -> None:
        """Let all sequences end before the next step."""
        self.cancel(self._keys)

    def remove_ended(self, now: float) -> list[SequenceUpdate[K]]:
        """Remove sequences that are cancelled or past their deadlines; called before each `plan`.

        Returns their last updates.
        """
        if now >= self._first_deadline:
            self._first_deadline = math.inf
            for sequence in (*self._running, *self._waiting):
                if sequence.spec.deadline.passed(now):
                    self._leaving.setdefault(sequence.spec.key, FinishReason.DEADLINE)
                else:
                    self._first_deadline = min(self._first_deadline, sequence.spec.deadline.at)
        if not self._leaving:
            return []
        leaving = [s for s in (*self._running, *self._waiting) if s.spec.key in self._leaving]
        return [self._finish(sequence, self._leaving[sequence.spec.key]) for sequence in leaving]

    def plan(self, now: float) -> list[Row]:
        """Choose the rows of the next step; empty if there is nothing to compute."""
        self._planned = planned = self._decodes()
        self._admit()
        self.tokens = len(planned)
        rows = [_row(sequence, 1) for sequence in planned]
        self._prefilling = []
        if len(planned) < len(self._running):
            decoding = set(planned)
            self._prefilling = [sequence for sequence in self._running if sequence not in decoding]
            for sequence, tokens in self._split(self._prefilling, self.step_tokens - len(planned)):
                if sequence.started is None:
                    sequence.started = now
                planned.append(sequence)
                rows.append(_row(sequence, tokens))
                self.tokens += tokens
        return rows

    def apply(
        self, rows: Sequence[Row], results: Sequence[Token | Fault | None], now: float
    ) -> list[SequenceUpdate[K]]:
        """Record the engine's results for the planned rows.

        Returns one update per sequence that has a new token or has ended.
        """
        updates = []
        self.decodes = 0
        for sequence, row, result in zip(self._planned, rows, results, strict=True):
            table = sequence.table
            assert table is not None
            if isinstance(result, Fault):
                # The blocks may hold wrong keys: no other sequence may use them.
                table.invalidate()
                updates.append(self._finish(sequence, FinishReason.FAULT, fault=result.message))
                continue
            sequence.computed = stop = row.stop
            if stop >= table.end:
                self._publish(sequence)
            if result is not None:
                updates.append(self._record(sequence, result, now))
        self._planned = []
        return updates

    def check(self) -> None:
        """Raise AssertionError if the accounting of KV memory is wrong. For tests."""
        self._pool.check([_table(sequence).blocks for sequence in self._running])

    def _decodes(self) -> list[LiveSequence[K]]:
        """Return the sequences that decode in this step, each with a block for it; preempts if needed."""
        size, running = self._pool.block_tokens, self._running
        decoding = []
        for sequence in running.copy():
            computed, table = sequence.computed, sequence.table
            if computed != len(sequence.ids) - 1 or table is None:
                continue
            if computed == len(table.blocks) * size:
                while not self._pool.available:
                    self._preempt(running[-1])
                if sequence.table is None:
                    break  # it was the last itself
                table.grow()
            decoding.append(sequence)
        return decoding

    def _preempt(self, sequence: LiveSequence[K]) -> None:
        """Return a running sequence to the waiting ones. Its tokens so far stay valid."""
        self._release(sequence)
        sequence.computed = 0
        sequence.needs = 0
        sequence.preempted += 1
        self.preemptions += 1
        insort(self._waiting, sequence, key=_rank)

    def _admit(self) -> None:
        """Start waiting sequences, by rank, while there are free slots and memory."""
        pool = self._pool
        while self._waiting and len(self._running) < self._model.max_running:
            sequence = self._waiting[0]
            # Each running sequence will soon need a block: a new one must not be preempted immediately.
            spare = pool.available - min(len(self._running), pool.blocks // 16)
            if sequence.needs > spare:
                return  # without another match, which takes time for long prompts
            found = pool.match(sequence.ids, sequence.spec.scope)
            sequence.needs = pool.need(len(sequence.ids), found)
            if sequence.needs > spare:
                return
            sequence.table = BlockTable(pool, sequence.ids, found, sequence.spec.scope)
            self._advance(sequence, sequence.table.published_tokens)
            del self._waiting[0]
            insort(self._running, sequence, key=_rank)

    def _split(self, prefilling: Sequence[LiveSequence[K]], budget: int) -> list[tuple[LiveSequence[K], int]]:
        """Split a budget of tokens among sequences with uncomputed prompt, given by rank."""
        for sequence in prefilling:
            self._publish(sequence)
        oldest = prefilling[0]
        rest: dict[LiveSequence[K], int] = {}
        computing: set[BlockKey] = set()
        for sequence in (oldest, *sorted(prefilling[1:], key=_uncomputed)):
            # Two sequences do not compute the same block: the second one finds it cached in the next step.
            key = _table(sequence).next_key(sequence.ids)
            if key is None or key not in computing:
                rest[sequence] = _uncomputed(sequence)
                if key is not None:
                    computing.add(key)
        chosen = {oldest: min(rest[oldest], (budget + 1) // 2)}
        budget -= chosen[oldest]
        rest[oldest] -= chosen[oldest]
        for sequence in sorted(rest, key=rest.__getitem__):
            tokens = min(rest[sequence], budget)
            if tokens:
                chosen[sequence] = chosen.get(sequence, 0) + tokens
                budget -= tokens
        return list(chosen.items())

    def _publish(self, sequence: LiveSequence[K]) -> None:
        """Add what it has computed to the prefix cache, and skip what others have added."""
        self._advance(sequence, _table(sequence).publish(sequence.ids, sequence.computed))

    def _advance(self, sequence: LiveSequence[K], computed: int) -> None:
        """Record that this many of its ids are computed; those above its own count come from the cache."""
        found = computed - sequence.computed
        if found:
            sequence.computed = computed
            if not sequence.preempted:  # afterwards the cache holds what the sequence computed itself
                sequence.cached += found
                self.cached_tokens += found

    def _record(self, sequence: LiveSequence[K], result: Token, now: float) -> SequenceUpdate[K]:
        spec, ids, token_ids = sequence.spec, sequence.ids, (result.id,)
        if sequence.first_token is None:
            sequence.first_token = now
        else:
            self.decodes += 1
        sequence.last_token = now
        if result.id in sequence.ends:
            return self._finish(sequence, FinishReason.STOP)
        offset = len(ids) - spec.prompt
        ids.append(result.id)
        logprobs = (result.logprob,) if spec.params.logprobs and result.logprob is not None else ()
        if len(ids) >= sequence.length:
            return self._finish(sequence, FinishReason.LENGTH, token_ids, logprobs)
        return SequenceUpdate(spec.key, offset, token_ids, logprobs, sequence.cached)

    def _finish(
        self,
        sequence: LiveSequence[K],
        reason: FinishReason,
        token_ids: Sequence[int] = (),
        logprobs: Sequence[float] = (),
        fault: str = "",
    ) -> SequenceUpdate[K]:
        key = sequence.spec.key
        self._keys.discard(key)
        self._leaving.pop(key, None)
        if sequence.table is None:
            self._waiting.remove(sequence)
        else:
            self._release(sequence)
        return SequenceUpdate(
            key=key,
            offset=sequence.answered - len(token_ids),
            token_ids=token_ids,
            logprobs=logprobs,
            cached=sequence.cached,
            finish=reason,
            fault=fault,
            times=SequenceTimes(sequence.started, sequence.first_token, sequence.last_token),
        )

    def _release(self, sequence: LiveSequence[K]) -> None:
        """Release the slot and the blocks of a running sequence."""
        self._running.remove(sequence)
        _table(sequence).release()
        sequence.table = None


def _rank(sequence: LiveSequence[K]) -> tuple[float, int]:
    return sequence.rank


def _uncomputed(sequence: LiveSequence[K]) -> int:
    return len(sequence.ids) - sequence.computed


def _table(sequence: LiveSequence[K]) -> BlockTable:
    """Return the blocks of a running sequence."""
    assert sequence.table is not None
    return sequence.table


def _row(sequence: LiveSequence[K], tokens: int) -> Row:
    table, start, ids, spec = sequence.table, sequence.computed, sequence.ids, sequence.spec
    assert table is not None
    stop = start + tokens
    # By position, because keyword arguments take twice as long; one is made per token.
    return Row(table.blocks, start, stop, ids, spec.prompt, stop == len(ids), spec.params, sequence.memo)
