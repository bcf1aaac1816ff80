"""The engine with a model: torch and transformers compute, we keep the KV memory and draw the tokens.

Each step is one forward pass over the tokens of all rows, flattened, through transformers' own
modelling code with `attention.slot_attention` in it; `sampling` turns the logits into tokens.
`loading` makes these engines from files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from headrace.worker.engine import packing
from headrace.worker.engine.attention import MIN_ROWS, SlotMemory, StepPlan, plan_step, step_order
from headrace.worker.engine.sampling import Sampler
from headrace.worker.engine.seam import Fault, ModelInfo, Row, Token

# Steps of fewer tokens are padded on the CPU, since its plain matrix kernels round differently below:
# measured bitwise with torch 2.13, the two default models' shapes and up to 600 rows.
MIN_TOKENS = {torch.float32: MIN_ROWS, torch.bfloat16: 2}


@dataclass(frozen=True, slots=True)
class Computed:
    """What a step made, and how.

    sampling   indices of the rows that sampled
    logits     [sampling rows, vocabulary], in the model's dtype
    tokens     what was drawn from them
    plan       what the attention layers saw
    """

    sampling: list[int]
    logits: torch.Tensor
    tokens: list[Token | Fault]
    plan: StepPlan


class TorchEngine:
    """Computes steps of one model.

    network   a transformers causal language model whose attention is `attention.IMPLEMENTATION`, in
              evaluation mode on its device
    model     what it tells about itself; max_running and context_length size the KV memory
    packed    whether all linear layers of the network are packed, and rows come out the same in steps of
              fewer tokens
    """

    def __init__(self, network: Any, model: ModelInfo, *, packed: bool = False) -> None:
        self._network = network
        self._model = model
        self._device = torch.device(model.device)
        dtype: torch.dtype = getattr(torch, model.dtype)
        self.memory = SlotMemory(model.max_running, model.context_length, device=self._device, dtype=dtype)
        self._sampler = Sampler(model.eos_ids, self._device)
        fewest = packing.MIN_TOKENS if packed else MIN_TOKENS
        self._min_tokens = fewest.get(dtype, MIN_ROWS) if self._device.type == "cpu" else 1
        self._lengths = [0] * model.max_running
        # Slots whose last token came from finite logits: what they hold is finite and may stay.
        self._proven = [True] * model.max_running

    @property
    def model(self) -> ModelInfo:
        """What is loaded; constant."""
        return self._model

    def step(self, rows: Sequence[Row]) -> list[Token | Fault | None]:
        """Compute all rows; see `Engine.step`.

        A row whose logits are not finite gets a Fault. Whatever else goes wrong, such as too little
        memory, raises, and the rows' slots must be released.
        """
        computed = self.compute(rows)
        results: list[Token | Fault | None] = [None] * len(rows)
        for index, token in zip(computed.sampling, computed.tokens, strict=True):
            results[index] = token
        return results

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Forget what the slot holds; the next row for it starts at position 0."""
        # Masked keys and values still count as 0 x value, so nothing but finite numbers may stay.
        if not self._proven[slot]:
            self.memory.erase(slot, self._lengths[slot])
        self._proven[slot] = True
        self._lengths[slot] = 0

    @torch.inference_mode()
    def compute(self, rows: Sequence[Row]) -> Computed:
        """Compute all rows as `step` does, and show the work."""
        order = step_order(rows)
        ordered = [rows[i] for i in order]
        for row in ordered:
            self._proven[row.slot] = False
            self._lengths[row.slot] = row.stop
        ids = list(chain.from_iterable(row.ids[row.start : row.stop] for row in ordered))
        positions = list(chain.from_iterable(range(row.start, row.stop) for row in ordered))
        padding = max(self._min_tokens - len(ids), 0)
        ids += [0] * padding
        positions += [0] * padding
        sampling, last = _last_tokens(order, ordered)
        keep = last + last[-1:] * max(self._min_tokens - len(last), 0) if last else []
        plan = plan_step(ordered, self.memory, self._device)
        outputs = self._network(
            input_ids=self._tensor([ids]),
            position_ids=self._tensor([positions]),
            use_cache=False,
            logits_to_keep=self._tensor(keep),
            headrace_step=plan,
        )
        logits = outputs.logits[0, : len(last)]
        tokens = self._sampler.sample(logits, [rows[i] for i in sampling]) if sampling else []
        for index, token in zip(sampling, tokens, strict=True):
            self._proven[rows[index].slot] = isinstance(token, Token)
        return Computed(sampling, logits, tokens, plan)

    def _tensor(self, values: list[Any]) -> torch.Tensor:
        tensor = torch.tensor(values, dtype=torch.int64)
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor


def _last_tokens(order: Sequence[int], ordered: Sequence[Row]) -> tuple[list[int], list[int]]:
    """Find the rows that sample and where in the step the last token of each lies."""
    sampling, last, end = [], [], 0
    for index, row in zip(order, ordered, strict=True):
        end += row.stop - row.start
        if row.sample:
            sampling.append(index)
            last.append(end - 1)
    return sampling, last
