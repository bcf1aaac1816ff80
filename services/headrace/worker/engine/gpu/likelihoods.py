"""What rows of a device's step ask for besides their tokens: the most likely tokens, and scores of prompts.

It is queued right after the step, which may be a replayed graph, and before the next one overwrites what it
reads. Steps whose rows ask for nothing do nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine.flat_step import scored_places
from headrace.worker.engine.gpu.cuda import Fetch, to_device
from headrace.worker.engine.gpu.kernels.likelihoods import COLUMNS, MOST, report_likelihoods
from headrace.worker.engine.interface import Result, Row, Token
from headrace.worker.engine.likelihoods import (
    NOT_FINITE,
    Likelihoods,
    add_prompts,
    most_of_prompts,
    prompt_parts,
    scored_ids,
)

# Tokens of a prompt whose logits are in memory at the same time: 80 MB in bfloat16 with a vocabulary of
# 152,000. Each slice has this size, so that the kernels of products are those that the start has compiled.
SCORED_TOKENS = 256


class DeviceLikelihoods:
    """Computes the likelihoods of one step on the device, without waiting for it.

    rows        of the step
    logits      [rows or more, vocabulary], of each row's last token
    sampled     [rows or more] int32, the tokens that the rows sample
    logits_of   see `DeviceForward`
    """

    def __init__(
        self,
        rows: Sequence[Row],
        logits: torch.Tensor,
        sampled: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._rows = rows
        self._vocabulary = logits.shape[1]
        self._asking = [index for index, row in enumerate(rows) if row.sample and row.params.top_logprobs]
        self._top: Fetch | None = None
        self._prompts: Fetch | None = None
        if self._asking:
            which = _upload(self._asking, logits.device)
            most = max(rows[index].params.top_logprobs for index in self._asking)
            self._top = Fetch(report_likelihoods(logits, which, sampled.index_select(0, which), most))
        if any(row.scored for row in rows):
            self._prompts = Fetch(self._score(logits.device, logits_of))

    def add_to(self, results: list[Result]) -> None:
        """Wait for the likelihoods, and add them to the results of the step."""
        if self._top is not None:
            found = self._read(self._top)
            for place, index in enumerate(self._asking):
                token = results[index]
                if isinstance(token, Token) and found.finite[place]:
                    token.top = found.top(place, self._rows[index].params.top_logprobs)
                elif isinstance(token, Token):
                    results[index] = NOT_FINITE  # a ban has hidden the logit that is not
        if self._prompts is not None:
            add_prompts(results, prompt_parts(self._rows, self._read(self._prompts)))

    def _score(self, device: torch.device, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the report of all scored tokens of prompts."""
        counts = [row.stop - row.start for row in self._rows]
        places = scored_places(self._rows, np.cumsum([0, *counts], dtype=np.int32))
        padding = (0, -len(places) % SCORED_TOKENS)
        ids = _upload(np.pad(scored_ids(self._rows), padding), device)
        padded = _upload(np.pad(places, padding, mode="edge"), device)
        which = torch.arange(SCORED_TOKENS, dtype=torch.int32, device=device)
        most = most_of_prompts(self._rows)
        reports = [
            report_likelihoods(logits_of(padded[begin:end]), which, ids[begin:end], most)
            for begin in range(0, len(padded), SCORED_TOKENS)
            for end in (begin + SCORED_TOKENS,)
        ]
        return torch.cat(reports)[: len(places)]

    def _read(self, report: Fetch) -> Likelihoods:
        table: npt.NDArray[np.int32] = report.wait().numpy()
        most = min(MOST.value, self._vocabulary)
        ids, logprobs = table[:, 2 : 2 + most], table[:, COLUMNS.value - MOST.value :][:, :most]
        return Likelihoods(
            table[:, 0] != 0,
            np.ascontiguousarray(table[:, 1]).view(np.float32),
            ids,
            np.ascontiguousarray(logprobs).view(np.float32),
        )


def _upload(numbers: Sequence[int] | npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(np.asarray(numbers, np.int32)), device)
