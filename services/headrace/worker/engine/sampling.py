"""Sample one token per row from logits on the CPU, for all rows of a step at once.

The filters have the semantics of transformers' logits processors, and apply in their order: logit bias,
repetition penalty, frequency and presence penalties (as OpenAI's API defines them), min_tokens, the grammar,
temperature, top-k, top-p, min-p. As there, tokens as likely as the last one that top-k keeps are kept too;
here that is also so for top-p, whose result would otherwise depend on how equal tokens are sorted. `noise`
supplies the randomness.

A row's token depends on its logits, ids and params, never on the other rows. `gpu.sampler` samples on the
device, with the same arithmetic: equal logits give equal tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine.cpu.kernels.sampling import ROW, WORK_OF_A_DRAW, SamplingKernel
from headrace.worker.engine.drawing.choosing import min_p_logs
from headrace.worker.engine.drawing.editing import Editor
from headrace.worker.engine.grammar.constraints import Constraints, StepMasks
from headrace.worker.engine.interface import Fault, Grammars, Row, SamplingParams, Token
from headrace.worker.engine.likelihoods import NOT_FINITE, likelihoods, logprobs
from headrace.worker.engine.noise import noise_key

log = logging.getLogger(__name__)

UNSAMPLED = Fault("the sequence's next token cannot be sampled; see the worker's log")

# Filters examine this many of the likeliest tokens first, and all tokens if those do not suffice.
CANDIDATES = 1024


class Sampler:
    """Samples tokens for one model.

    eos_ids    ids that `min_tokens` bans
    grammars   of the model's vocabulary; None to support none
    """

    def __init__(self, eos_ids: frozenset[int], grammars: Grammars | None = None) -> None:
        self._editor = Editor(eos_ids)
        self._constraints = Constraints(grammars, sorted(eos_ids), threads=torch.get_num_threads())
        self._parameters = _Parameters()
        self._kernel: SamplingKernel | None = None

    def sample(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[Token | Fault]:
        """Sample the token at `row.stop` for each row.

        logits   [rows, vocabulary], any float type; not modified

        Log-probabilities are of the model's own distribution, before temperature, filters and penalties. A
        row that cannot be sampled, whatever its parameters or because its logits are not finite, gets a
        Fault; other rows are not affected.
        """
        try:
            return self._sample(logits, rows)
        except Exception:
            log.exception("a step cannot be sampled as a whole", extra={"rows": len(rows)})
        return [self._single(logits[index : index + 1], row) for index, row in enumerate(rows)]

    def _single(self, logits: torch.Tensor, row: Row) -> Token | Fault:
        try:
            return self._sample(logits, [row])[0]
        except Exception:
            return UNSAMPLED

    def _sample(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[Token | Fault]:
        logits = logits.float().contiguous()
        if self._kernel is None or self._kernel.vocabulary != logits.shape[1]:
            self._kernel = SamplingKernel(
                logits.shape[1], candidates=CANDIDATES, threads=torch.get_num_threads()
            )
        table = self._parameters.table(rows)
        starts = np.arange(len(rows)) * (4 * logits.shape[1])
        table["logits"] = table["scores"] = starts + logits.data_ptr()
        constrained = [index for index, row in enumerate(rows) if row.params.grammar]
        unmasked = [i for i in constrained if _can_do_without(rows[i]) and self._constraints.is_free(rows[i])]
        masks = self._constraints.compute(rows, sorted({*constrained} - {*unmasked})) if constrained else None
        scores, faults = self._edit(logits, rows, masks.lifted if masks is not None else ())
        if scores is not logits:
            table["scores"] = starts + scores.data_ptr()
        if masks is not None:
            _restrict(table, masks)
        self._kernel(table, self._parameters.work)
        if masks is not None:
            faults |= masks.faults
        if unmasked:
            faults |= self._sample_again(self._kernel, table, rows, unmasked)
        own = _logprobs(table).tolist() if self._parameters.logprobs else [None] * len(rows)
        tokens: list[Token | Fault] = [
            faults[index]
            if index in faults
            else Token(token, logprob if row.params.logprobs else None)
            if finite
            else NOT_FINITE
            for index, (row, token, finite, logprob) in enumerate(
                zip(rows, table["id"].tolist(), table["finite"].tolist(), own, strict=True)
            )
        ]
        asking = [index for index, row in enumerate(rows) if row.params.top_logprobs]
        if asking:
            self._add_top(logits, rows, tokens, asking)
        return tokens

    def _sample_again(
        self, kernel: SamplingKernel, table: npt.NDArray[Any], rows: Sequence[Row], unmasked: Sequence[int]
    ) -> dict[int, Fault]:
        """Sample rows, given by index, again with a mask where it may change the token.

        It cannot if the grammar allows the token, and also the likeliest one, which scores are relative to.
        Most tokens of a model that knows the form are so, and finding that out takes less time than a mask
        (llama.cpp samples in this order, too, in common/sampling.cpp).

        Returns the faults of rows, by index.
        """
        refused = [
            index
            for index in unmasked
            if not table["finite"][index]
            or not self._constraints.allows(rows[index], {*table[["likeliest", "id"]][index].tolist()})
        ]
        if not refused:
            return {}
        masks = self._constraints.compute(rows, refused)
        _restrict(table, masks)
        again = table[refused]
        kernel(again, len(again) * WORK_OF_A_DRAW)
        table[refused] = again
        return masks.faults

    def _add_top(
        self,
        logits: torch.Tensor,
        rows: Sequence[Row],
        tokens: list[Token | Fault],
        asking: Sequence[int],
    ) -> None:
        """Add the most likely tokens to the tokens of rows, given by index."""
        ids = [token.id if isinstance(token := tokens[index], Token) else 0 for index in asking]
        found = likelihoods(
            logits[list(asking)], ids, max(rows[index].params.top_logprobs for index in asking)
        )
        for place, index in enumerate(asking):
            token = tokens[index]
            if isinstance(token, Token) and found.finite[place]:
                token.top = found.top(place, rows[index].params.top_logprobs)
            elif isinstance(token, Token):
                tokens[index] = NOT_FINITE  # a ban has hidden the logit that is not

    def _edit(
        self, logits: torch.Tensor, rows: Sequence[Row], lifted: Collection[int] = ()
    ) -> tuple[torch.Tensor, dict[int, Fault]]:
        """Apply bias, penalties and min_tokens. Returns *logits* itself if no row has any.

        lifted   indices of rows to which min_tokens does not apply

        Also returns the faults of rows whose parameters cannot be applied.
        """
        numbered = dict(enumerate(rows))
        edits, faults = self._editor.find(numbered, logits.shape[1])
        if edits:
            logits = logits.to(torch.float32, copy=True)
            self._editor.apply(logits, numbered, edits, lifted)
        return logits, faults


def _can_do_without(row: Row) -> bool:
    """Return whether a mask gives the same token wherever it allows that token and the likeliest one.

    Not so with top_k and top_p, which would count tokens that the mask excludes, and not while min_tokens
    bans ends: where the mask allows nothing else, the ban does not apply.
    """
    params = row.params
    filtered = params.temperature > 0 and (params.top_k or params.top_p < 1)
    return not filtered and row.stop - row.prompt >= params.min_tokens


def _restrict(table: npt.NDArray[Any], masks: StepMasks) -> None:
    """Put the addresses of masks into the table of their rows."""
    for index, place in masks.places.items():
        table["mask"][index] = masks.bits.ctypes.data + place * masks.bits.strides[0]


class _Parameters:
    """Makes the tables for a `SamplingKernel`.

    logprobs   whether a row of the last table asks for its log-probability
    work       how long the last table takes, see `SamplingKernel`
    """

    def __init__(self) -> None:
        self.logprobs = False
        self.work = 0
        self._params: list[SamplingParams] = []
        self._table: npt.NDArray[Any] = np.zeros(0, ROW)
        self._drawing: list[int] = []  # rows with a temperature

    def table(self, rows: Sequence[Row]) -> npt.NDArray[Any]:
        """Return the parameters of the rows, without the addresses of logits.

        Most steps have the rows of the step before, so only the keys of their noise are new.
        """
        params = [row.params for row in rows]
        if params != self._params:
            self._table = _table(params)
            self._drawing = [index for index, own in enumerate(params) if own.temperature > 0]
            asking = sum(own.logprobs for own in params)
            self.logprobs = asking > 0
            self.work = len(params) + (asking + len(self._drawing)) * WORK_OF_A_DRAW
            self._params = params
        table = self._table.copy()
        if self._drawing:
            keys = [noise_key(rows[index].params.seed, rows[index].stop) for index in self._drawing]
            table["key_first"][self._drawing], table["key_second"][self._drawing] = zip(*keys, strict=True)
        return table


def _table(params: Sequence[SamplingParams]) -> npt.NDArray[Any]:
    table = np.zeros(len(params), ROW)
    # float() and int() raise TypeError for None, which numpy would store as NaN.
    table["temperature"] = [float(own.temperature) for own in params]
    table["top_k"] = [int(own.top_k) for own in params]
    table["top_p"] = [float(own.top_p) for own in params]
    table["min_p_log"] = min_p_logs([float(own.min_p) for own in params])
    table["logprobs"] = [own.logprobs for own in params]
    return table


def _logprobs(rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the log-probabilities of the sampled tokens; undefined for rows that did not ask for them."""
    return logprobs(rows["own"], rows["largest"], rows["mass"])
