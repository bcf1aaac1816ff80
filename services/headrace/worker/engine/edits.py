"""The changes that one sequence's parameters make to its logits, as arrays that are updated per token.

Logit bias, penalties and min_tokens change the logits of single tokens, which depend on the sequence's
parameters and ids. The arrays are kept with the sequence (`interface.Memo`), because rebuilding them for
each token takes time proportional to the sequence's length. Plain numbers, no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from headrace.worker.engine.interface import Row, SamplingParams

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Tally:
    """Counts occurrences of ids. Adding one takes amortized constant time."""

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
        """The distinct ids."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Floats:
        """How often each of `ids` has occurred."""
        return self._counts[: len(self._places)]


class Edits:
    """The logit changes of one sequence.

    row          any of its rows
    eos_ids      ids that end a turn
    vocabulary   number of tokens

    bias_ids, biases   ids of `logit_bias`, and their biases
    endings            ids that would end the answer, without those outside the vocabulary
    seen               counts all ids so far, for a repetition penalty
    answered           counts the answer's ids so far, for a frequency or presence penalty
    known              number of ids that are counted

    Raises ValueError if `logit_bias` contains an id outside the vocabulary.
    """

    __slots__ = ("_vocabulary", "answered", "bias_ids", "biases", "endings", "known", "seen")

    def __init__(self, row: Row, eos_ids: Collection[int], vocabulary: int) -> None:
        params = row.params
        self._vocabulary = vocabulary
        self.known = 0
        self.bias_ids: Ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
        self.biases: Floats = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
        check_ids(params.logit_bias, vocabulary, "logit_bias")
        banned = endings(params, eos_ids) if params.min_tokens else ()
        self.endings: Ids = np.array(sorted(id for id in banned if 0 <= id < vocabulary), np.int64)
        self.seen = Tally() if params.repetition_penalty != 1 else None
        self.answered = Tally() if params.frequency_penalty or params.presence_penalty else None

    def advance(self, row: Row) -> None:
        """Count the new ids of *row*. Raises ValueError for an id outside the vocabulary."""
        if self.seen is not None:
            new = row.ids[self.known : row.stop]
            check_ids(new, self._vocabulary, "the sequence")
            self.seen.add(new)
        if self.answered is not None:
            new = row.ids[max(self.known, row.prompt) : row.stop]
            check_ids(new, self._vocabulary, "the sequence")
            self.answered.add(new)
        self.known = row.stop


def endings(params: SamplingParams, eos_ids: Collection[int]) -> set[int]:
    """Return the ids that would end the answer, which min_tokens bans."""
    return {*(() if params.ignore_eos else eos_ids), *params.stop_ids}


def check_ids(ids: Collection[int], vocabulary: int, where: str) -> None:
    """Raise ValueError if an id is not one of the vocabulary; *where* is the subject of the message."""
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocabulary):
        raise ValueError(f"{where} contains a token id that is not below {vocabulary}")
