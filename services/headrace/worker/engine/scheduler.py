"""Decide what each engine step computes: iteration-level continuous batching.

Sequences join and leave between steps (Orca, OSDI 2022) and prompts are cut into chunks that share
the step with decodes under a token budget (Sarathi-Serve, OSDI 2024), so that a long prompt does not
stall the answers around it. Plain data and plain functions: no clock, no thread, no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from headrace.worker.engine.seam import Fault, ModelInfo, Row, SamplingParams, Token

K = TypeVar("K", bound=Hashable)


class Ending(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    FAULT = "fault"


@dataclass(slots=True)
class LiveSequence(Generic[K]):
    """One request inside the engine.

    ids       prompt and answer so far; grows
    prompt    how many of the ids are prompt
    resumed   how many answer ids came with the request, delivered by an earlier attempt
    computed  how many ids are in KV memory
    expires   on the caller's clock, seconds; None for never
    """

    key: K
    ids: list[int]
    prompt: int
    params: SamplingParams
    expires: float | None
    submitted: float
    resumed: int = 0
    computed: int = 0
    slot: int = -1
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

    model         limits: context_length, max_running, eos_ids
    step_tokens   most tokens that one step computes; at least max_running, so that decodes always fit

    First come, first served: running sequences decode in every step; what is left of the budget goes
    to prompts in order of arrival. Every sequence added leaves through exactly one update with an
    ending.
    """

    def __init__(self, model: ModelInfo, *, step_tokens: int = 512) -> None:
        self._model = model
        self._step_tokens = max(step_tokens, model.max_running)
        self._waiting: deque[LiveSequence[K]] = deque()
        self._running: dict[K, LiveSequence[K]] = {}  # in order of arrival
        self._keys: set[K] = set()
        self._leaving: dict[K, Ending] = {}
        # Lowest slot first keeps the occupied slots dense, which engines can exploit.
        self._free_slots = list(range(model.max_running - 1, -1, -1))
        self._planned: list[LiveSequence[K]] = []

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for one."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Nothing to compute and nothing to report."""
        return not self._keys

    @property
    def uncomputed_prompt_tokens(self) -> int:
        """Prompt tokens that are still to be computed."""
        return sum(
            max(s.prompt + s.resumed - s.computed, 0) for s in (*self._running.values(), *self._waiting)
        )

    @property
    def kv_tokens(self) -> int:
        """Tokens in KV memory."""
        return sum(s.computed for s in self._running.values())

    def oldest_wait(self, now: float) -> float:
        """How long the first of the waiting has waited, in seconds."""
        return now - self._waiting[0].submitted if self._waiting else 0.0

    def add(self, sequence: LiveSequence[K]) -> None:
        """Take a sequence in. Its key must not be in use."""
        if sequence.key in self._keys:
            raise ValueError(f"key {sequence.key!r} is in use")
        self._keys.add(sequence.key)
        self._waiting.append(sequence)

    def cancel(self, key: K) -> None:
        """Let a sequence leave before the next step. Unknown keys are none of our business."""
        if key in self._keys:
            self._leaving[key] = Ending.CANCELLED

    def cancel_all(self) -> None:
        """Let everything leave before the next step."""
        for key in self._keys:
            self._leaving[key] = Ending.CANCELLED

    def expel(self, now: float) -> tuple[list[Update[K]], list[int]]:
        """Remove what was cancelled and what has expired at *now*.

        Returns their last updates, and the slots that became free. Called before each `plan`.
        """
        for sequence in (*self._running.values(), *self._waiting):
            if sequence.expires is not None and now >= sequence.expires:
                self._leaving.setdefault(sequence.key, Ending.DEADLINE)
        if not self._leaving:
            return [], []
        updates, slots = [], []
        for sequence in [s for s in (*self._running.values(), *self._waiting) if s.key in self._leaving]:
            if sequence.slot >= 0:
                slots.append(sequence.slot)
            updates.append(self._end(sequence, self._leaving[sequence.key]))
        self._waiting = deque(s for s in self._waiting if s.key in self._keys)
        self._leaving.clear()
        return updates, slots

    def plan(self, now: float) -> list[Row]:
        """Choose the rows of the next step; empty when there is nothing to compute."""
        while self._waiting and self._free_slots:
            sequence = self._waiting.popleft()
            sequence.slot = self._free_slots.pop()
            self._running[sequence.key] = sequence
        budget = self._step_tokens
        chosen: dict[K, int] = {}
        for sequence in self._running.values():
            if len(sequence.ids) - sequence.computed == 1:  # decodes first: their readers are waiting
                chosen[sequence.key] = 1
                budget -= 1
        for sequence in self._running.values():
            if sequence.key not in chosen and budget > 0:
                chosen[sequence.key] = min(budget, len(sequence.ids) - sequence.computed)
                budget -= chosen[sequence.key]
        self._planned = [self._running[key] for key in chosen]
        rows = []
        for sequence in self._planned:
            if sequence.started is None:
                sequence.started = now
            stop = sequence.computed + chosen[sequence.key]
            rows.append(
                Row(
                    slot=sequence.slot,
                    start=sequence.computed,
                    stop=stop,
                    ids=sequence.ids,
                    prompt=sequence.prompt,
                    sample=stop == len(sequence.ids),
                    params=sequence.params,
                )
            )
        return rows

    def apply(
        self, rows: Sequence[Row], results: Sequence[Token | Fault | None], now: float
    ) -> tuple[list[Update[K]], list[int]]:
        """Book what the engine made of the planned rows.

        Returns one update per sequence that has news, and the slots that became free.
        """
        updates, slots = [], []
        for sequence, row, result in zip(self._planned, rows, results, strict=True):
            sequence.computed = row.stop
            if result is None:
                continue
            update = self._book(sequence, result, now)
            updates.append(update)
            if update.ending is not None:
                slots.append(row.slot)
        self._planned = []
        return updates, slots

    def _book(self, sequence: LiveSequence[K], result: Token | Fault, now: float) -> Update[K]:
        if isinstance(result, Fault):
            return self._end(sequence, Ending.FAULT, fault=result.message)
        params = sequence.params
        if sequence.first_token is None:
            sequence.first_token = now
        sequence.last_token = now
        if result.id in self._model.eos_ids and not params.ignore_eos:
            return self._end(sequence, Ending.STOP)
        offset = sequence.answered
        sequence.ids.append(result.id)
        update = Update(sequence, offset, [result.id])
        if params.logprobs and result.logprob is not None:
            update.logprobs.append(result.logprob)
        if sequence.answered >= params.max_tokens or len(sequence.ids) >= self._model.context_length:
            update.ending = self._end(sequence, Ending.LENGTH).ending
        return update

    def _end(self, sequence: LiveSequence[K], ending: Ending, fault: str = "") -> Update[K]:
        self._keys.discard(sequence.key)
        self._leaving.pop(sequence.key, None)
        if sequence.slot >= 0:
            del self._running[sequence.key]
            self._free_slots.append(sequence.slot)
            self._free_slots.sort(reverse=True)
            sequence.slot = -1
        return Update(sequence, sequence.answered, ending=ending, fault=fault)
