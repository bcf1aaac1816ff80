"""Decide what each engine step computes: iteration-level continuous batching.

Sequences join and leave between steps (Orca, OSDI 2022). Prompts are computed in chunks that share a step
with decodes under a token budget (Sarathi-Serve, OSDI 2024), so that a long prompt does not stall the
answers around it. KV memory is allocated in blocks; when it runs out, the sequence that came last is
preempted and recomputed later (vLLM, SOSP 2023). Plain data and plain functions: no clock, no thread, no
torch. `blocks` does the accounting of the blocks.

A step may be planned before the results of the step before it are known. Steps are computed in the order in
which they are planned, so a sequence continues after what a launched step writes for it, and a block that a
launched step still uses may be given to another sequence. Whether that step succeeds is not known yet: only
what a returned step has written is shared through the prefix cache. So if a step fails, its own sequences
end, and no other sequence has read what it wrote.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Generic

from headrace.worker.engine.interface import Fault, ModelInfo, PromptLogprobs, Result, Token
from headrace.worker.engine.plan.blocks import BlockKey, BlockPool, BlockTable
from headrace.worker.engine.plan.sequences import LiveSequence, PlannedStep, record
from headrace.worker.engine.plan.speculation import MOST_ROWS, Speculation
from headrace.worker.runner import FinishReason, K, SequenceSpec, SequenceUpdate

# One level of priority counts as an arrival this much earlier, as in the batcher's queue. So urgent
# sequences go first, and no sequence starves behind those that arrive long after it.
PRIORITY_SECONDS = 10.0

_rank = attrgetter("rank")
_uncomputed = attrgetter("uncomputed")


class Scheduler(Generic[K]):
    """Chooses the rows of each step and records their results.

    model          limits: context_length, max_running, KV memory, eos_ids
    step_tokens    most tokens that one step computes; at least max_running, so that decodes always fit
    prefix_cache   whether sequences with a common prefix share what is computed
    speculation    chooses drafts for an engine that verifies them; None for none

    Sequences are ranked by arrival; each level of priority counts as some seconds. They start in this order,
    as soon as there is a free slot and KV memory for all their ids. If a decode needs a block and none is
    available, the sequence with the last rank is preempted. Running sequences decode in every step, and
    prompts share the rest of its budget: half is for the first in rank, the other half for the shortest. So
    a long prompt does not stall short ones, and short ones do not stall it. Every sequence added leaves
    through exactly one update with a finish reason.

    Each planned step is launched and then applied, in order. At most one is not applied yet when the next one
    is planned: then its sequences go on with tokens that are pending, except those that reach their length.

    step_tokens     as given, but at least max_running
    decodes         tokens of the last applied step that continued an answer
    dropped         tokens of the last applied step whose sequence had ended meanwhile
    preemptions     since the start
    cached_tokens   ids that the prefix cache held, since the start
    """

    def __init__(
        self,
        model: ModelInfo,
        *,
        step_tokens: int = 512,
        prefix_cache: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        self._model = model
        self._speculation = speculation
        self.step_tokens = max(step_tokens, model.max_running)
        self._pool = BlockPool(model.kv_blocks, model.block_tokens, prefix_cache=prefix_cache)
        # Both by rank.
        self._waiting: list[LiveSequence[K]] = []
        self._running: list[LiveSequence[K]] = []
        self._keys: set[K] = set()
        self._leaving: dict[K, FinishReason] = {}
        # Those of the running sequences that had uncomputed prompt when the last step was planned.
        self._prefilling: list[LiveSequence[K]] = []
        self._first_deadline = math.inf  # no sequence's deadline is earlier
        self._added = 0
        self.decodes = 0
        self.dropped = 0
        self.accepted = 0
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
        missing = sum(s.uncomputed for s in self._waiting)
        for sequence in self._prefilling:
            rest = sequence.uncomputed
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

    def add(self, spec: SequenceSpec[K], matcher: Any = None) -> LiveSequence[K]:
        """Add a sequence.

        matcher   of its grammar, for `Memo.matcher`

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
            unscored=spec.prompt if params.prompt_logprobs is None else 1,
        )
        sequence.memo.matcher = matcher
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

    def plan(self, now: float) -> PlannedStep[K]:
        """Choose the rows of the next step; none if there is nothing to compute now."""
        step: PlannedStep[K] = PlannedStep(now)
        self._add_decodes(step, self._drafts())
        self._admit()
        self._prefilling = []
        if len(step.rows) < len(self._running):
            decoding = set(step.sequences)
            # A pending sequence without a decode waits for its last token.
            self._prefilling = [s for s in self._running if s not in decoding and not s.pending]
        if self._prefilling:
            for sequence, tokens in self._split(self._prefilling, self.step_tokens - len(step.rows)):
                if sequence.started is None:
                    sequence.started = now
                step.add(sequence, tokens)
        return step

    def apply(self, step: PlannedStep[K], results: Sequence[Result], now: float) -> list[SequenceUpdate[K]]:
        """Record the engine's results for a planned step.

        Returns one update per sequence that has a new token or a new part of its prompt, or has ended. A
        sequence that was preempted after the step was planned keeps both; those of one that has ended are
        dropped.
        """
        updates = []
        self.decodes = self.dropped = self.accepted = 0
        if self._speculation is not None and len(step.rows) == step.tokens:  # it only decoded
            self._speculation.times.record(step.tokens + step.drafted, now - step.planned)
        for sequence, row, result in zip(step.sequences, step.rows, results, strict=True):
            if row.sample:
                sequence.pending -= 1
            if sequence.ended:
                self.dropped += isinstance(result, Token)
                continue
            table = sequence.table
            if isinstance(result, Fault):
                # The blocks may hold wrong keys: no other sequence may use them.
                if table is not None:
                    table.invalidate()
                reason = FinishReason.INVALID if result.invalid else FinishReason.FAULT
                updates.append(self._finish(sequence, reason, fault=result.message))
                continue
            stop, update = row.stop, None
            if isinstance(result, Token):
                self.decodes += sequence.first_token is not None
                update = record(sequence, result, now)
                if row.draft:
                    stop += self._accept(sequence, result, len(update.token_ids))
            elif isinstance(result, PromptLogprobs):
                update = SequenceUpdate(
                    sequence.spec.key, sequence.answered, cached=sequence.cached, prompt=result
                )
            # After a preemption, the blocks are others, or none.
            if table is not None and table.blocks is row.blocks:
                if stop > sequence.confirmed:  # else it has adopted cached blocks beyond
                    sequence.confirmed = stop
                if stop >= table.end:
                    self._publish(sequence)
            if update is not None:
                if update.finish is not None:
                    self._end(sequence)
                updates.append(update)
        return updates

    def check(self) -> None:
        """Raise AssertionError if the accounting of KV memory is wrong. For tests."""
        self._pool.check([_table(sequence).blocks for sequence in self._running])

    def _drafts(self) -> Mapping[LiveSequence[K], Sequence[int]]:
        """Return the drafts of the running sequences, if all of them decode in this step and none waits."""
        running, speculation = self._running, self._speculation
        if speculation is None or self._waiting or len(running) > MOST_ROWS or self._prefilling:
            return {}
        return dict(zip(running, speculation.drafts([s.candidate() for s in running]), strict=True))

    def _add_decodes(self, step: PlannedStep[K], drafts: Mapping[LiveSequence[K], Sequence[int]]) -> None:
        """Add the sequences that decode in this step, each with a block for it; preempts if needed."""
        size, running, add = self._pool.block_tokens, self._running, step.add
        for sequence in running.copy():
            computed, table = sequence.computed, sequence.table
            known = len(sequence.ids) + sequence.pending
            if computed != known - 1 or known >= sequence.length or table is None:
                continue
            if computed == len(table.blocks) * size:
                while not self._pool.available:
                    self._preempt(running[-1])
                if sequence.table is None:
                    break  # it was the last itself
                table.grow()
            draft = drafts.get(sequence, ()) if drafts else ()
            if draft:
                # Other sequences need the last blocks more.
                covered = computed + 1 + len(draft)
                while len(table.blocks) * size < covered and self._pool.available > len(running):
                    table.grow()
                draft = draft[: len(table.blocks) * size - computed - 1]
            add(sequence, 1, draft)

    def _preempt(self, sequence: LiveSequence[K]) -> None:
        """Return a running sequence to the waiting ones. Its tokens stay valid, a pending one too."""
        self._release(sequence)
        sequence.computed = sequence.confirmed = 0
        sequence.needs = 0
        sequence.preempted += 1
        self.preemptions += 1
        insort(self._waiting, sequence, key=_rank)

    def _admit(self) -> None:
        """Start waiting sequences, by rank, while there are free slots and memory."""
        pool = self._pool
        while self._waiting and len(self._running) < self._model.max_running:
            sequence = self._waiting[0]
            if sequence.pending:
                return  # its last id is known before the next step is planned
            # Each running sequence will soon need a block: a new one must not be preempted immediately.
            spare = pool.available - min(len(self._running), pool.blocks // 16)
            if sequence.needs > spare:
                return  # without another match, which takes time for long prompts
            found = pool.match(sequence.ids, sequence.spec.scope, readable=sequence.readable)
            sequence.needs = pool.need(len(sequence.ids), found)
            if sequence.needs > spare:
                return
            sequence.table = BlockTable(pool, sequence.ids, found, sequence.spec.scope)
            self._confirm(sequence, sequence.table.published_tokens)
            del self._waiting[0]
            insort(self._running, sequence, key=_rank)

    def _split(self, prefilling: Sequence[LiveSequence[K]], budget: int) -> list[tuple[LiveSequence[K], int]]:
        """Split a budget of tokens among sequences with uncomputed prompt, given by rank."""
        for sequence in prefilling:
            self._publish(sequence)
        # Two sequences do not compute the same block: the second one finds it cached in a later step. The
        # first one's block is cached when the step that completes it has returned.
        computing: dict[BlockKey, LiveSequence[K]] = {}
        for sequence in self._running:
            table = sequence.table
            if table is not None and sequence.computed >= table.end > sequence.confirmed:
                key = table.next_key(sequence.ids)
                if key is not None:
                    computing.setdefault(key, sequence)
        rest: dict[LiveSequence[K], int] = {}
        for sequence in (prefilling[0], *sorted(prefilling[1:], key=_uncomputed)):
            key = _table(sequence).next_key(sequence.ids, sequence.readable)
            if key is None or computing.setdefault(key, sequence) is sequence:
                rest[sequence] = sequence.uncomputed
        if not rest:
            return []
        oldest = next(iter(rest))
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
        confirmed = _table(sequence).publish(sequence.ids, sequence.confirmed, sequence.readable)
        self._confirm(sequence, confirmed)

    def _confirm(self, sequence: LiveSequence[K], confirmed: int) -> None:
        """Record that this many of its ids are computed; those above its own count come from the cache."""
        sequence.confirmed = confirmed
        found = confirmed - sequence.computed
        if found > 0:
            sequence.computed = confirmed
            if not sequence.preempted:  # afterwards the cache holds what the sequence computed itself
                sequence.cached += found
                self.cached_tokens += found

    def _accept(self, sequence: LiveSequence[K], result: Token, recorded: int) -> int:
        """Count the right tokens of a sequence's draft. Returns how many of them its answer contains."""
        if self._speculation is not None and sequence.speculative is not None:
            self._speculation.record(sequence.speculative, len(result.more))
        accepted = min(recorded, len(result.more))
        self.accepted += accepted
        sequence.computed += accepted
        return accepted

    def _finish(self, sequence: LiveSequence[K], reason: FinishReason, fault: str = "") -> SequenceUpdate[K]:
        """End a sequence without a new token, and return its last update."""
        self._end(sequence)
        return SequenceUpdate(
            key=sequence.spec.key,
            offset=sequence.answered,
            cached=sequence.cached,
            finish=reason,
            fault=fault,
            times=sequence.times,
        )

    def _end(self, sequence: LiveSequence[K]) -> None:
        spec, sequence.ended = sequence.spec, True
        self._keys.discard(spec.key)
        self._leaving.pop(spec.key, None)
        if self._speculation is not None:
            self._speculation.remember(spec.scope, sequence.ids[spec.prompt :])
        if sequence.table is None:
            self._waiting.remove(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: LiveSequence[K]) -> None:
        """Release the slot and the blocks of a running sequence."""
        self._running.remove(sequence)
        _table(sequence).release()
        sequence.table = None


def _table(sequence: LiveSequence[K]) -> BlockTable:
    """Return the blocks of a running sequence."""
    assert sequence.table is not None
    return sequence.table
