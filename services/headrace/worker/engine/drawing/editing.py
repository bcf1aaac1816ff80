"""Apply what the parameters of sequences change in single logits: bias, penalties and min_tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine.edits import Edits, Ids
from headrace.worker.engine.interface import Fault, Row


class Editor:
    """Edits the logits of rows of one model, on any device.

    eos_ids   ids that `min_tokens` bans
    """

    def __init__(self, eos_ids: Collection[int]) -> None:
        self._eos_ids = sorted(eos_ids)

    def find(self, rows: Mapping[int, Row], vocabulary: int) -> tuple[dict[int, Edits], dict[int, Fault]]:
        """Return the edits of rows that have some, and the faults of rows whose parameters cannot be applied.

        rows   by their index in the logits, as are the results
        """
        edits: dict[int, Edits] = {}
        faults: dict[int, Fault] = {}
        for index, row in rows.items():
            try:
                if (own := self._edits(row, vocabulary)) is not None:
                    edits[index] = own
            except (ValueError, OverflowError, TypeError) as error:
                faults[index] = Fault(f"the sequence's parameters cannot be applied: {error}")
        return edits, faults

    def apply(
        self,
        scores: torch.Tensor,
        rows: Mapping[int, Row],
        edits: Mapping[int, Edits],
        lifted: Collection[int] = (),
    ) -> None:
        """Edit scores in place.

        scores   [rows, vocabulary] float32, contiguous
        lifted   indices of rows to which min_tokens does not apply
        """
        flat, width = scores.view(-1), scores.shape[1]
        if biased := {i: own.bias_ids for i, own in edits.items() if len(own.bias_ids)}:
            biases = _joined([edits[i].biases for i in biased], flat)
            flat.scatter_add_(0, _places(width, biased, flat), biases)
        if repeated := {i: own.seen.ids for i, own in edits.items() if own.seen is not None}:
            places = _places(width, repeated, flat)
            penalties = [np.float32(rows[i].params.repetition_penalty) for i in repeated]
            counts = [len(ids) for ids in repeated.values()]
            penalty = torch.from_numpy(np.repeat(penalties, counts)).to(flat.device)
            seen = flat.gather(0, places)
            flat.scatter_(0, places, torch.where(seen < 0, seen * penalty, seen / penalty))
        if counted := {i: own.answered for i, own in edits.items() if own.answered is not None}:
            added = [
                np.float32(-rows[i].params.frequency_penalty) * tally.counts
                - np.float32(rows[i].params.presence_penalty)
                for i, tally in counted.items()
            ]
            answered = {i: tally.ids for i, tally in counted.items()}
            flat.scatter_add_(0, _places(width, answered, flat), _joined(added, flat))
        if banned := {
            i: own.endings
            for i, own in edits.items()
            if rows[i].stop - rows[i].prompt < rows[i].params.min_tokens
            and i not in lifted
            and len(own.endings)
        }:
            flat[_places(width, banned, flat)] = float("-inf")

    def _edits(self, row: Row, vocabulary: int) -> Edits | None:
        """Return a row's edits, updated; None if it has none. Raises ValueError, see `Edits`."""
        params = row.params
        if not (
            params.logit_bias
            or params.repetition_penalty != 1
            or params.frequency_penalty
            or params.presence_penalty
            or row.stop - row.prompt < params.min_tokens
        ):
            return None
        edits: Edits | None = row.memo.kept
        if edits is None or edits.known > row.stop:
            edits = row.memo.kept = Edits(row, self._eos_ids, vocabulary)
        edits.advance(row)
        return edits


def _places(width: int, ids: Mapping[int, Ids], beside: torch.Tensor) -> torch.Tensor:
    """Return the indices of the rows' ids in the flat scores; *width* is the length of a row."""
    return _joined([own + index * width for index, own in ids.items()], beside)


def _joined(arrays: Sequence[npt.NDArray[Any]], beside: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(beside.device)
