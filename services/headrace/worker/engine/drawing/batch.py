"""Draw the next tokens of an engine that lets us change its logits and then takes the likeliest token.

The engine numbers the rows of its batch, and says when a sequence enters, leaves or moves. Rows that are not
ours stay as they are. A drawn token depends on the row's logits, ids and parameters alone, so an answer can be
resumed in another batch or on another machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from headrace.grammars.compiling import GrammarProblem
from headrace.grammars.matching import Matcher, follow
from headrace.worker.engine.drawing.choosing import Filters, choose
from headrace.worker.engine.drawing.editing import Editor
from headrace.worker.engine.edits import endings
from headrace.worker.engine.grammar.constraints import Constraints, StepMasks
from headrace.worker.engine.interface import Grammars, Memo, Row, SamplingParams
from headrace.worker.engine.noise import noise_keys

log = logging.getLogger(__name__)

_THREADS = 2  # that compile grammars, while steps run


@dataclass(slots=True)
class Drawn:
    """A sequence of the batch.

    prompt    number of its ids that are prompt
    begun     prompt, then the resumed part of the answer
    answer    the ids after them; the engine appends to it
    """

    params: SamplingParams
    prompt: int
    begun: Sequence[int]
    answer: Sequence[int]
    ids: list[int] = field(init=False)
    memo: Memo = field(default_factory=Memo)
    matcher: Future[Matcher] | None = None

    def __post_init__(self) -> None:
        self.ids = list(self.begun)

    @property
    def position(self) -> int:
        """Position of the token to draw."""
        return len(self.begun) + len(self.answer)

    @property
    def edited(self) -> bool:
        """Whether its logits are edited or masked: its ids matter, not only how many there are."""
        own = self.params
        penalised = own.repetition_penalty != 1 or own.presence_penalty or own.frequency_penalty
        return bool(own.grammar or own.logit_bias or own.min_tokens or penalised)

    def row(self) -> Row:
        """Return the row that draws its next token."""
        self.ids.extend(self.answer[len(self.ids) - len(self.begun) :])
        stop = len(self.ids)
        return Row((), stop - 1, stop, self.ids, self.prompt, True, self.params, self.memo)


class DrawnBatch:
    """The sequences of one engine's batch, by the number of their row.

    eos_ids    ids that `min_tokens` bans, and that end an answer whose grammar cannot be followed
    grammars   returns those of the model, None if it has none; called when the first one is needed
    """

    def __init__(
        self, eos_ids: frozenset[int], device: torch.device, grammars: Callable[[], Grammars | None]
    ) -> None:
        self._eos_ids = sorted(eos_ids)
        self._device = device
        self._editor = Editor(eos_ids)
        self._grammars = grammars
        self._constraints: Constraints | None = None
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammars")
        self._sequences: dict[int, Drawn] = {}
        self._layout: _Layout | None = None

    def put(self, row: int, sequence: Drawn) -> None:
        """Begin a sequence; its grammar is compiled, and the resumed part of its answer replayed, meanwhile."""
        if sequence.params.grammar:
            sequence.matcher = self._threads.submit(self._follow, sequence)
        self._sequences[row] = sequence
        self._layout = None

    def remove(self, row: int) -> None:
        """Remove the sequence of a row, if there is one."""
        if self._sequences.pop(row, None) is not None:
            self._layout = None

    def move(self, source: int, target: int, *, swap: bool) -> None:
        """Move the sequence of a row to another one; *swap* exchanges them."""
        moved, other = self._sequences.pop(source, None), self._sequences.pop(target, None)
        if moved is not None:
            self._sequences[target] = moved
        if swap and other is not None:
            self._sequences[source] = other
        if moved is not None or other is not None:
            self._layout = None

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Make the token that is drawn for each sequence the only possible one of its row.

        logits   [rows, vocabulary] float32, of the model; modified
        """
        if not self._sequences:
            return logits
        layout = self._layout
        if layout is None:
            layout = self._layout = _Layout.of(self._sequences, logits.shape[1], self._device)
        scores = logits[layout.rows]
        if layout.edited:
            self._edit(scores, {place: layout.sequences[place].row() for place in layout.edited}, layout)
        positions = np.array([own.position for own in layout.sequences], np.uint64)
        keys = torch.from_numpy(noise_keys(layout.seeds, positions)).to(self._device)
        chosen = choose(scores, layout.filters, keys)
        logits.index_fill_(0, layout.rows, float("-inf"))
        logits[layout.rows, chosen] = 0.0
        return logits

    def _edit(self, scores: torch.Tensor, rows: dict[int, Row], layout: _Layout) -> None:
        constrained = {place: row for place, row in rows.items() if row.params.grammar}
        masks, places = self._restrict(constrained, layout) if constrained else (None, [])
        lifted = {places[index] for index in masks.lifted} if masks else ()
        edits, faults = self._editor.find(rows, scores.shape[1])
        self._editor.apply(scores, rows, edits, lifted)
        ended = set(faults)
        if masks:
            _mask(scores, masks, places)
            ended |= {places[index] for index in masks.faults}
        for place in ended:
            # Whoever follows the answer sees that it may not end here.
            scores[place] = float("-inf")
            scores[place, min(endings(layout.sequences[place].params, self._eos_ids), default=0)] = 0.0

    def _restrict(self, rows: dict[int, Row], layout: _Layout) -> tuple[StepMasks, list[int]]:
        """Return the masks of rows with grammars, and the place of each."""
        if self._constraints is None:
            threads = torch.get_num_threads()
            self._constraints = Constraints(self._grammars(), self._eos_ids, threads=threads)
        for place, row in rows.items():
            sequence = layout.sequences[place]
            if sequence.matcher is not None:
                row.memo.matcher = _outcome(sequence.matcher)
                sequence.matcher = None
        ordered = list(rows.values())
        return self._constraints.compute(ordered, range(len(ordered))), list(rows)

    def _follow(self, sequence: Drawn) -> Matcher:
        grammars = self._grammars()
        if grammars is None:
            raise GrammarProblem("the engine does not support grammars")
        return follow(grammars, sequence.params.grammar, sequence.begun[sequence.prompt :])


def _outcome(matcher: Future[Matcher]) -> Matcher | None:
    """Wait for a matcher; None if there is none: the row then finds the same problem itself."""
    try:
        return matcher.result()
    except GrammarProblem:
        return None
    except Exception:
        log.exception("a grammar cannot be compiled")
        return None


def _mask(scores: torch.Tensor, masks: StepMasks, places: Sequence[int]) -> None:
    """Remove the tokens that grammars exclude."""
    if not masks.places:
        return
    rows = torch.tensor([places[index] for index in masks.places], device=scores.device)
    bits = torch.from_numpy(masks.bits[list(masks.places.values())]).to(scores.device)
    ids = torch.arange(32, dtype=torch.int32, device=scores.device)
    allowed = ((bits[:, :, None] >> ids) & 1).bool().flatten(1)[:, : scores.shape[1]]
    excluded = torch.ones((len(rows), scores.shape[1]), dtype=torch.bool, device=scores.device)
    excluded[:, : allowed.shape[1]] = ~allowed
    scores[rows] = scores[rows].masked_fill_(excluded, float("-inf"))


@dataclass(frozen=True, slots=True)
class _Layout:
    """What is constant while the batch has the same sequences in the same rows.

    rows        of the sequences, on the device
    sequences   in that order; a place is an index into them
    edited      places of those whose logits are edited or masked
    """

    rows: torch.Tensor
    sequences: list[Drawn]
    edited: list[int]
    seeds: np.ndarray[tuple[int], np.dtype[np.uint64]]
    filters: Filters

    @classmethod
    def of(cls, sequences: dict[int, Drawn], vocabulary: int, device: torch.device) -> _Layout:
        rows = sorted(sequences)
        ordered = [sequences[row] for row in rows]
        params = [own.params for own in ordered]
        return cls(
            torch.tensor(rows, device=device),
            ordered,
            [place for place, own in enumerate(ordered) if own.edited],
            np.array([own.seed for own in params], np.uint64),
            Filters.of(params, vocabulary, device),
        )
