"""What the scheduler knows of each sequence, and the steps that it plans of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic

from headrace.worker.engine.interface import UNSCORED, Memo, Row
from headrace.worker.engine.plan.blocks import BlockTable
from headrace.worker.runner import K, SequenceSpec


@dataclass(slots=True, eq=False)
class LiveSequence(Generic[K]):
    """A sequence inside the scheduler.

    ids         prompt and answer so far; grows
    rank        the lowest goes first
    length      number of ids at which it ends
    ends        tokens that end it
    memo        the engine's
    table       its blocks while it runs
    computed    number of positions in KV memory, those that launched steps will write included
    confirmed   how many of them were written by steps that have returned without a fault
    pending     tokens that launched steps sample and that are not known yet. The position of such a token is
                known, so the sequence decodes on. At most one when a step is planned
    ended       whether its last update was returned; results of launched steps are dropped then
    unscored    position of the first prompt token whose log-probability no launched step computes. The length
                of the prompt if there is none, also if the sequence does not ask for them
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
    unscored: int
    memo: Memo = field(default_factory=Memo)
    table: BlockTable | None = None
    computed: int = 0
    confirmed: int = 0
    pending: int = 0
    ended: bool = False
    cached: int = 0
    preempted: int = 0
    needs: int = 0
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    @property
    def answered(self) -> int:
        """Number of known answer tokens, including those of earlier attempts."""
        return len(self.ids) - self.spec.prompt

    @property
    def uncomputed(self) -> int:
        """Number of known ids that neither are in KV memory nor will be after the launched steps."""
        return len(self.ids) - self.computed

    @property
    def readable(self) -> int:
        """Number of its first ids that the prefix cache may supply: for the others, logits are needed."""
        return len(self.ids) if self.unscored >= self.spec.prompt else self.unscored - 1


@dataclass(slots=True, eq=False)
class PlannedStep(Generic[K]):
    """A step to launch: its rows, decodes first, and the sequence of each row.

    tokens   ids that it computes
    """

    rows: list[Row] = field(default_factory=list)
    sequences: list[LiveSequence[K]] = field(default_factory=list)
    tokens: int = 0

    def add(self, sequence: LiveSequence[K], tokens: int) -> None:
        """Add a row for this many further ids of a running sequence, which count as computed from now on."""
        table, start, spec = sequence.table, sequence.computed, sequence.spec
        assert table is not None
        pending = sequence.pending
        sequence.computed = stop = start + tokens
        sample = stop == len(sequence.ids) + pending
        if sample:
            sequence.pending = pending + 1
        scored = UNSCORED
        # Planned once, whatever becomes of the step: a sequence that is preempted keeps the result, and one
        # whose step fails ends. So no part of a prompt is reported twice.
        if sequence.unscored < spec.prompt and sequence.unscored <= stop:
            scored = range(sequence.unscored, min(stop + 1, spec.prompt))
            sequence.unscored = scored.stop
        self.sequences.append(sequence)
        self.tokens += tokens
        # By position, because keyword arguments take twice as long; one is made per token.
        self.rows.append(
            Row(
                table.blocks,
                start,
                stop,
                sequence.ids,
                spec.prompt,
                sample,
                spec.params,
                sequence.memo,
                pending > 0,
                table.version,
                scored,
            )
        )
