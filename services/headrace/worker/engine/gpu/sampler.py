"""Sampling on the device: what is kept of each sequence there, and the results of a step.

`kernels.sampling` computes the tokens, with the arithmetic of `worker.engine.sampling`. A sequence's
parameters are uploaded once, when it begins in a slot. After that the device counts the tokens of the
sequence itself, so the host need not know them: steps can run ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.grammars.matching import Bits
from headrace.validation import MAX_BIASES, MAX_STOP_IDS
from headrace.worker.engine.drawing.choosing import min_p_logs
from headrace.worker.engine.edits import Edits, check_ids
from headrace.worker.engine.gpu import cuda
from headrace.worker.engine.gpu.cuda import to_device
from headrace.worker.engine.gpu.kernels.sampling import BLOCK, CANDIDATES, Layout, SamplingMemory, sample
from headrace.worker.engine.gpu.kernels.sampling import parameters as column
from headrace.worker.engine.gpu.step_inputs import StepInputs
from headrace.worker.engine.grammar.constraints import StepMasks
from headrace.worker.engine.interface import Fault, Result, Row, SamplingParams, Token
from headrace.worker.engine.likelihoods import NOT_FINITE

_LARGEST = 2**31 - 1


class DeviceSampler:
    """Samples the tokens of one model on a device.

    slots        number of slots, without that of padding rows; also the most rows of a step
    vocabulary   number of tokens, at most 2^22
    eos_ids      ids that `min_tokens` bans
    block        tokens of a program of a kernel
    candidates   how many of the likeliest tokens filters examine first; changes no result

    Takes a little more than 8 bytes of memory per slot and token of the vocabulary.
    """

    def __init__(
        self,
        slots: int,
        vocabulary: int,
        eos_ids: frozenset[int],
        device: torch.device,
        *,
        block: int = BLOCK,
        candidates: int = CANDIDATES,
    ) -> None:
        self._vocabulary = vocabulary
        self._eos_ids = sorted(eos_ids)
        self._device = device
        self._layout = Layout(MAX_BIASES, MAX_STOP_IDS + len(eos_ids))
        self._memory = SamplingMemory(
            slots, vocabulary, self._layout, device, block=block, candidates=candidates
        )
        self._masks = cuda.HostBuffer(slots * self._memory.words, device)

    @property
    def latest(self) -> torch.Tensor:
        """The token sampled last in each slot, [slots + 1] int32 on the device; at a fixed address."""
        return self._memory.latest

    def assign(self, slot: int, row: Row) -> Fault | None:
        """Begin a sequence in a slot, or begin it anew: upload its parameters, and counts of its ids.

        row   any row of the sequence that is not `pending`. All of its ids are counted: the counts are valid
              for a row that samples at position len(row.ids). Each row that samples moves that position by
              one

        Takes effect after the steps that are launched already, and before later ones. Returns a Fault if the
        parameters cannot be applied: what the sequence samples is then undefined.
        """
        if row.pending:
            raise ValueError("the ids of a pending row are not complete")
        fault = None
        counts = None
        try:
            parameters = self._parameters(row)
            if int(parameters[column.FLAGS.value]) & column.PENALISED.value:
                counts = self._counts(row)
        except (ValueError, OverflowError, TypeError) as error:
            fault = Fault(f"the sequence's parameters cannot be applied: {error}")
            parameters = np.zeros(self._layout.width, np.int32)
        memory = self._memory
        memory.parameters[slot].copy_(to_device(torch.from_numpy(parameters), self._device))
        if counts is not None:
            memory.counts[slot].copy_(to_device(torch.from_numpy(counts), self._device))
        return fault

    def restrict(self, compute: Callable[[Bits], StepMasks]) -> StepMasks:
        """Upload the masks of the next step that is drawn, without waiting for its logits.

        compute   computes them, each in a row of an array
        """
        memory, host = self._memory, self._masks
        array = host.array().reshape(memory.masks.shape)
        masks = compute(array)
        array[: masks.count, -1] = 0
        array[[masks.places[index] for index in masks.lifted], -1] = 1
        host.copy_to(memory.masks.view(-1), masks.count * memory.words)
        return masks

    def draw(self, logits: torch.Tensor, step: StepInputs, results: torch.Tensor) -> None:
        """Sample the rows of a step whose `samples` is not 0, without waiting; can be captured.

        logits    [rows, vocabulary], any float type; not modified
        results   [3, rows] int32, contiguous: receives tokens, whether the logits were finite, and
                  log-probabilities as bits of float32; see `read_tokens`. Zeros for rows that do not sample

        Updates `latest` and the counts of the slots of rows that sample. A row does not depend on others.
        """
        sample(logits, step, self._memory, results)

    def _parameters(self, row: Row) -> npt.NDArray[np.int32]:
        """Return the columns of a slot. Raises ValueError, OverflowError or TypeError for invalid ones."""
        params, layout = row.params, self._layout
        edits = Edits(row, self._eos_ids, self._vocabulary)
        _check_room("logit_bias", edits.bias_ids, layout.biases)
        _check_room("stop_ids", edits.endings, layout.endings)
        columns = np.zeros(layout.width, np.int32)
        reals: npt.NDArray[Any] = columns.view(np.float32)
        columns[column.TOP_K.value] = params.top_k if 0 < params.top_k < self._vocabulary else 0
        columns[column.BAN_UNTIL.value] = min(row.prompt + params.min_tokens, _LARGEST)
        for place, value in (
            (column.TEMPERATURE, params.temperature),
            (column.TOP_P, params.top_p),
            (column.REPETITION, params.repetition_penalty),
            (column.FREQUENCY, -params.frequency_penalty),
            (column.PRESENCE, params.presence_penalty),
        ):
            reals[place.value] = float(value)
        reals[column.MIN_P_LOG.value] = min_p_logs([float(params.min_p)])[0]
        penalised = edits.seen is not None or edits.answered is not None
        columns[column.FLAGS.value] = (
            (column.EDITED.value if penalised or len(edits.bias_ids) else 0)
            | (column.PENALISED.value if penalised else 0)
            | (column.LOGPROBS.value if params.logprobs else 0)
        )
        columns[column.BIASES.value] = len(edits.bias_ids)
        columns[column.ENDINGS.value] = len(edits.endings)
        order = np.argsort(edits.bias_ids)
        columns[layout.bias_ids][: len(order)] = edits.bias_ids[order]
        columns[layout.bias_values][: len(order)] = edits.biases[order].view(np.int32)
        columns[layout.ending_ids][: len(edits.endings)] = edits.endings
        return columns

    def _counts(self, row: Row) -> npt.NDArray[np.int32]:
        """Return the counts of all ids of a sequence. Raises ValueError for an id outside the vocabulary."""
        ids = np.asarray(row.ids, np.int64)
        check_ids(ids, self._vocabulary, "the sequence")
        counts = np.bincount(ids[row.prompt :], minlength=self._vocabulary).astype(np.int32)
        counts[ids] |= column.SEEN.value
        return counts


def _check_room(name: str, ids: Collection[int], room: int) -> None:
    if len(ids) > room:
        raise ValueError(f"{name} has {len(ids)} token ids, at most {room} are supported")


def counts_ids(params: SamplingParams) -> bool:
    """Return whether sampling with these parameters needs to know how often each token has occurred."""
    return bool(params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty)


def read_tokens(results: torch.Tensor, rows: Sequence[Row]) -> list[Result]:
    """Return the results of a step: one entry per row, None for a row that does not sample.

    results   [3, rows or more] int32 on the host, from `DeviceSampler.draw`
    """
    ids, finite = results[:2].tolist()
    logprobs = results[2].view(torch.float32).tolist()
    return [
        (Token(ids[index], logprobs[index] if row.params.logprobs else None) if finite[index] else NOT_FINITE)
        if row.sample
        else None
        for index, row in enumerate(rows)
    ]
