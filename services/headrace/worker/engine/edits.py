"""What one sequence's parameters do to its logits, as arrays that are made once and kept up to date.

Biases, penalties and the ban on ending early name tokens one by one. Which ones is a function of the
sequence's parameters and ids, and so are these arrays: they are kept on the sequence (`seam.Memo`), for
building them anew for each token takes longer the longer the sequence is. Plain numbers, no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from headrace.worker.engine.interface import Row

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Tally:
    """Which ids have come, and how often. Counting one more takes constant time, on average."""

    __slots__ = ("_counts", "_ids", "_places")

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids: Ids = np.zeros(64, np.int64)
        self._counts: Floats = np.zeros(64, np.float32)

    def add(self, ids: Sequence[int]) -> None:
        """Count ids."""
        places = self._places
        if not places and len(ids) > len(self._ids):  # a whole prompt
            self._ids, counts = np.unique(np.array(ids, np.int64), return_counts=True)
            self._counts = counts.astype(np.float32)
            places.update(zip(self._ids.tolist(), range(len(self._ids)), strict=True))
            return
        for token in ids:
            place = places.get(token)
            if place is None:
                place = places[token] = len(places)
                if place == len(self._ids):
                    self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                    self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
                self._ids[place] = token
            self._counts[place] += 1

    @property
    def ids(self) -> Ids:
        """The ids, each once."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Floats:
        """How often each of `ids` has come."""
        return self._counts[: len(self._places)]


class Edits:
    """The edits of one sequence.

    row          any of its rows
    eos_ids      what ends a turn
    vocabulary   how many tokens there are

    bias_ids, biases   what `logit_bias` names, and what it adds
    endings            ids that would end the answer; those that no token has are left out
    seen               of all ids so far, if a repetition penalty asks for them
    answered           of the answer's ids so far, if a frequency or presence penalty asks for them

    Raises ValueError where `logit_bias` names a token that there is not.
    """

    __slots__ = ("_vocabulary", "answered", "bias_ids", "biases", "endings", "known", "seen")

    def __init__(self, row: Row, eos_ids: Collection[int], vocabulary: int) -> None:
        params = row.params
        self._vocabulary = vocabulary
        self.known = 0  # ids that are counted
        self.bias_ids: Ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
        self.biases: Floats = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
        self._check(params.logit_bias, "logit_bias")
        endings = {*(() if params.ignore_eos else eos_ids), *params.stop_ids} if params.min_tokens else ()
        self.endings: Ids = np.array(sorted(id for id in endings if 0 <= id < vocabulary), np.int64)
        self.seen = Tally() if params.repetition_penalty != 1 else None
        self.answered = Tally() if params.frequency_penalty or params.presence_penalty else None

    def advance(self, row: Row) -> None:
        """Count the ids of *row* that are new. Raises ValueError for one that no token has."""
        if self.seen is not None:
            new = row.ids[self.known : row.stop]
            self._check(new, "the sequence")
            self.seen.add(new)
        if self.answered is not None:
            new = row.ids[max(self.known, row.prompt) : row.stop]
            self._check(new, "the sequence")
            self.answered.add(new)
        self.known = row.stop

    def _check(self, ids: Collection[int], where: str) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self._vocabulary):
            raise ValueError(f"{where} names a token that is not among the model's {self._vocabulary}")
