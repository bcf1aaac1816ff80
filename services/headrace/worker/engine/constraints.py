"""Restrict the rows of a step to their grammars: compute which tokens each may sample.

The matcher of a sequence is kept in `Row.memo.matcher`. It is a function of the sequence's grammar and the
ids of its answer: one that is missing is rebuilt. Plain numbers on the host; the samplers apply them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from headrace.grammars.compiling import GrammarProblem, Grammars
from headrace.grammars.matching import Bits, Masks, Matcher, follow
from headrace.worker.engine.edits import endings
from headrace.worker.engine.interface import Fault, Row

UNSUPPORTED = Fault("the engine does not support grammars", invalid=True)


@dataclass(slots=True)
class StepMasks:
    """The masks of the rows of a step that have a grammar.

    bits     [masks, words] int32, see `Masks.words`
    places   the row of `bits` of each row, by the index of the row
    lifted   rows whose grammar allows only tokens that min_tokens bans: for them the ban does not apply
    faults   of rows that cannot follow their grammar, by the index of the row
    """

    bits: Bits
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
        self, rows: Sequence[Row], indices: Sequence[int], latest: Mapping[int, int] | None = None
    ) -> StepMasks:
        """Compute the masks of the rows with these indices, all of which sample and have a grammar.

        latest   the id at position `row.start` of rows that are pending, by index; by default, no row is

        A row that cannot follow its grammar gets a Fault; other rows are not affected.
        """
        grammars, masks = self._grammars, self._masks
        if grammars is None or masks is None:
            return StepMasks(np.empty((0, 0), np.int32), faults=dict.fromkeys(indices, UNSUPPORTED))
        found = StepMasks(np.empty((len(indices), masks.words), np.int32))
        matchers: list[Matcher] = []
        for index in indices:
            row = rows[index]
            try:
                matchers.append(_advanced(grammars, row, None if latest is None else latest.get(index)))
            except GrammarProblem as problem:
                found.faults[index] = fault_of(problem)
            else:
                found.places[index] = len(found.places)
        problems = masks.fill(matchers, found.bits)
        for index, place in list(found.places.items()):
            if place in problems:
                found.faults[index] = fault_of(problems[place])
                del found.places[index]
            elif rows[index].stop - rows[index].prompt < rows[index].params.min_tokens:
                self._lift(rows[index], index, place, found)
        return found

    def _lift(self, row: Row, index: int, place: int, found: StepMasks) -> None:
        """Lift the ban of min_tokens if the grammar of a row allows nothing else."""
        rest = found.bits[place].view(np.uint32).copy()
        for id in endings(row.params, self._eos_ids):
            if id // 32 < len(rest):
                rest[id // 32] &= ~np.uint32(1 << id % 32)
        if not rest.any():
            found.lifted.add(index)


def _advanced(grammars: Grammars, row: Row, latest: int | None) -> Matcher:
    """Return the matcher of a row after all ids before the one that it samples. Raises GrammarProblem."""
    answered = row.stop - row.prompt
    matcher: Matcher | None = row.memo.matcher
    if matcher is None or matcher.consumed > answered:
        matcher = row.memo.matcher = follow(grammars, row.params.grammar, ())
    ids = list(row.ids[row.prompt + matcher.consumed : row.stop])
    if len(ids) < answered - matcher.consumed and latest is not None:
        ids.append(latest)
    matcher.advance(ids)
    return matcher


def fault_of(problem: GrammarProblem) -> Fault:
    """Return the fault of a row with a problem of its grammar."""
    return Fault(f"the answer cannot follow its grammar: {problem}", invalid=True)
