"""Restrict the rows of a step to their grammars: compute which tokens each may sample.

The matcher of a sequence is kept in `Row.memo.matcher`. It is a function of the sequence's grammar and the
ids of its answer: one that is missing is rebuilt. Plain numbers on the host; the samplers apply them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from headrace.grammars.compiling import GrammarProblem, Grammars
from headrace.grammars.matching import Bits, Masks, Matcher
from headrace.worker.engine.edits import endings
from headrace.worker.engine.interface import Fault, Row

UNSUPPORTED = Fault("the engine does not support grammars", invalid=True)


@dataclass(slots=True)
class StepMasks:
    """The masks of the rows of a step that have a grammar.

    bits     [masks, words] int32, see `Masks.words`; undefined for rows with faults
    count    number of rows that were asked for
    places   the row of `bits` of each row without a fault, by the index of the row
    lifted   rows whose grammar allows only tokens that min_tokens bans: for them the ban does not apply
    faults   of rows that cannot follow their grammar, by the index of the row
    """

    bits: Bits
    count: int
    places: dict[int, int] = field(default_factory=dict)
    lifted: set[int] = field(default_factory=set)
    faults: dict[int, Fault] = field(default_factory=dict)


class Constraints:
    """Computes the masks of one model's rows.

    grammars   of the model's vocabulary; None if the engine does not support them
    eos_ids    ids that min_tokens bans
    threads    that compute masks
    """

    def __init__(self, grammars: Grammars | None, eos_ids: Sequence[int], *, threads: int) -> None:
        self._grammars = grammars
        self._eos_ids = eos_ids
        self._masks = Masks(grammars.vocabulary, threads=threads) if grammars is not None else None

    @property
    def words(self) -> int:
        """Number of int32 of a mask; 0 if grammars are not supported."""
        return 0 if self._masks is None else self._masks.words

    def compute(
        self,
        rows: Sequence[Row],
        indices: Sequence[int],
        latest: Mapping[int, int] | None = None,
        bits: Bits | None = None,
    ) -> StepMasks:
        """Compute the masks of the rows with these indices, all of which sample and have a grammar.

        latest   the id at position `row.start` of rows that are pending, by index. The result of a pending
                 row without one is ignored: it has neither a mask nor a fault. By default, no row is pending
        bits     [indices or more, words or more] int32: receives the masks; by default a new array

        A row that cannot follow its grammar gets a Fault; other rows are not affected.
        """
        if bits is None:
            bits = np.empty((len(indices), self.words), np.int32)
        found = StepMasks(bits, len(indices))
        if not indices:
            return found
        if self._grammars is None or self._masks is None:
            found.faults = dict.fromkeys(indices, UNSUPPORTED)
            return found
        matchers: dict[int, Matcher] = {}
        problems: dict[int, GrammarProblem] = {}
        answers = {}
        for place, index in enumerate(indices):
            row = rows[index]
            if row.pending and (latest is None or index not in latest):
                continue
            answers[place] = _Answer(row, [latest[index]] if latest is not None and row.pending else [])
            try:
                matchers[place] = _advanced(self._grammars, row, answers[place])
            except GrammarProblem as problem:
                problems[place] = problem
        problems |= self._masks.fill(matchers, bits)
        for place in list(problems):
            # Other answers may have used up a limit that all matchers of a compiled grammar share. The step
            # waits for a compiler now, so that happens once for a sequence.
            row, ids = rows[indices[place]], answers[place].after(0)
            if row.memo.matcher is not None and row.memo.matcher.alone:
                continue
            try:
                inner = self._grammars.matcher(row.params.grammar, afresh=True)
                matcher = row.memo.matcher = Matcher(inner, alone=True)
                matcher.advance(ids)
                del problems[place]
                problems |= self._masks.fill({place: matcher}, bits)
            except GrammarProblem as problem:
                problems[place] = problem
        for place in answers:
            index = indices[place]
            if place in problems:
                found.faults[index] = fault_of(problems[place])
                continue
            found.places[index] = place
            banning = answers[place].length < rows[index].params.min_tokens
            if banning and self._allows_only_ends(rows[index], bits[place]):
                found.lifted.add(index)
        return found

    def is_free(self, row: Row) -> bool:
        """Return whether `allows` answers for a row: it has a matcher, and its next byte is not forced."""
        try:
            return self._grammars is not None and not _advanced(self._grammars, row, _Answer(row, [])).forced
        except GrammarProblem:
            return False

    def allows(self, row: Row, ids: Collection[int]) -> bool:
        """Return whether the mask of a free row would have all of the ids; takes a small part of its time."""
        matcher: Matcher = row.memo.matcher
        return all(map(matcher.allows, ids))

    def _allows_only_ends(self, row: Row, mask: Bits) -> bool:
        """Return whether a mask allows nothing but ids that would end the answer."""
        rest = mask[: self.words].view(np.uint32).copy()
        for id in endings(row.params, self._eos_ids):
            if id // 32 < len(rest):
                rest[id // 32] &= ~np.uint32(1 << id % 32)
        return not rest.any()


class _Answer:
    """The answer of a row before the token that it samples.

    latest   its last id if the row is pending, else empty
    """

    __slots__ = ("_latest", "_row", "length")

    def __init__(self, row: Row, latest: list[int]) -> None:
        self._row = row
        self._latest = latest
        self.length = row.stop - row.prompt

    def after(self, begin: int) -> Sequence[int]:
        """Return the ids from a place of the answer on."""
        row = self._row
        return [*row.ids[row.prompt + begin : row.stop - len(self._latest)], *self._latest]


def _advanced(grammars: Grammars, row: Row, answer: _Answer) -> Matcher:
    """Return the matcher of a row after its answer. Raises GrammarProblem."""
    matcher: Matcher | None = row.memo.matcher
    if matcher is None or matcher.consumed > answer.length:
        matcher = row.memo.matcher = Matcher(grammars.matcher(row.params.grammar))
    if matcher.consumed < answer.length:
        matcher.advance(answer.after(matcher.consumed))
    return matcher


def fault_of(problem: GrammarProblem) -> Fault:
    """Return the fault of a row with a problem of its grammar."""
    return Fault(f"the answer cannot follow its grammar: {problem}", invalid=True)
