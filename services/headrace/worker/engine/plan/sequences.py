"""What the scheduler knows of each sequence, and the steps that it plans of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic

from headrace.grammars.matching import Matcher
from headrace.worker.engine.interface import UNSCORED, Memo, Row, Token
from headrace.worker.engine.plan.blocks import BlockTable
from headrace.worker.engine.plan.speculation import Candidate, SpeculativeSequence
from headrace.worker.runner import FinishReason, K, SequenceSpec, SequenceTimes, SequenceUpdate


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
    speculative what speculative decoding keeps of it; None until it is a candidate for a draft
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
    speculative: SpeculativeSequence | None = None
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

    def candidate(self) -> Candidate:
        """Return the sequence as a candidate for a draft."""
        if self.speculative is None:
            self.speculative = SpeculativeSequence(self.spec.scope)
        most = self.length - len(self.ids) - 1
        return Candidate(self.speculative, self.ids, most, self._forced_ids()[: max(most, 0)])

    def _forced_ids(self) -> list[int]:
        """Return the ids that its grammar probably leaves no choice about; none without a grammar."""
        matcher: Matcher | None = self.memo.matcher
        if matcher is None or matcher.consumed > self.answered:
            return []
        try:
            matcher.advance(self.ids[self.spec.prompt + matcher.consumed :])
            return matcher.forced_ids()
        except Exception:  # the engine meets it again when it samples, and only this sequence ends
            return []

    @property
    def times(self) -> SequenceTimes:
        """When it reached each stage so far."""
        return SequenceTimes(self.started, self.first_token, self.last_token)


def record(sequence: LiveSequence[K], result: Token, now: float) -> SequenceUpdate[K]:
    """Add the tokens of a result to a sequence, up to its end.

    Returns the update with them. If it has a finish, the caller must end the sequence.
    """
    spec, ids, finish = sequence.spec, sequence.ids, None
    if sequence.first_token is None:
        sequence.first_token = now
    sequence.last_token = now
    offset = len(ids) - spec.prompt
    tokens: Sequence[Token] = (result, *result.more) if result.more else (result,)
    for token in tokens:
        if token.id in sequence.ends:
            finish = FinishReason.STOP
            break
        ids.append(token.id)
        if len(ids) >= sequence.length:
            finish = FinishReason.LENGTH
            break
    recorded = len(ids) - spec.prompt - offset
    # By position and without a list for the usual single token: one update is made per token.
    token_ids = (result.id,) if recorded == 1 else tuple(ids[len(ids) - recorded :])
    update = SequenceUpdate(spec.key, offset, token_ids, (), sequence.cached, finish)
    if finish is not None:
        update.times = sequence.times
    if spec.params.logprobs:
        update.logprobs = [token.logprob for token in tokens[:recorded] if token.logprob is not None]
    if result.top is not None:
        update.top = [token.top for token in tokens[:recorded] if token.top is not None]
    if result.prompt is not None:
        update.prompt = result.prompt
    return update


@dataclass(slots=True, eq=False)
class PlannedStep(Generic[K]):
    """A step to launch: its rows, decodes first, and the sequence of each row.

    planned  when it was planned, in seconds of time.monotonic()
    tokens   ids that it computes, without drafts
    drafted  tokens of its drafts
    """

    planned: float
    rows: list[Row] = field(default_factory=list)
    sequences: list[LiveSequence[K]] = field(default_factory=list)
    tokens: int = 0
    drafted: int = 0

    def add(self, sequence: LiveSequence[K], tokens: int, draft: Sequence[int] = ()) -> None:
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
        self.drafted += len(draft)
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
                draft,
            )
        )
