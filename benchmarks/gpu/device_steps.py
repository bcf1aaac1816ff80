"""Steps of the GPU kernels without an engine: inputs, KV memory and attention over it, of chosen lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.shapes import Shape
from headrace.worker.engine.gpu.filling import fill
from headrace.worker.engine.gpu.paged_attention import BLOCK_TOKENS, PagedAttention, Scratch, tile_tokens
from headrace.worker.engine.gpu.slots import Slots
from headrace.worker.engine.gpu.step_inputs import StepInputs, StepShape, packed_numbers
from headrace.worker.engine.interface import Row, SamplingParams
from headrace.worker.engine.kv_memory import LayerShape, PagedMemory
from headrace.worker.engine.transformers_attention import LayerAttention, Masking

GREEDY = SamplingParams(seed=1, max_tokens=1 << 30, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True)
class DeviceStep:
    """A step on the device.

    rows        its rows, whose keys and values are in memory
    attention   computes a layer of it
    layers      number of layers in memory, with the same attention
    """

    rows: list[Row]
    inputs: StepInputs
    attention: PagedAttention
    layers: int
    masking: Masking

    def attend(self, query: torch.Tensor, out: torch.Tensor) -> None:
        """Compute attention in all layers, for queries and results [tokens, heads, head_dim]."""
        for layer in range(self.layers):
            self.attention.attend(layer, query, self.masking, out)


def make_step(
    shape: Shape,
    parts: Sequence[tuple[int, int]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    layers: int,
    exact: bool = False,
    params: SamplingParams = GREEDY,
) -> DeviceStep:
    """Make a step of sequences with random keys and values, each with blocks of its own.

    parts   the first position to compute and the one after the last, of each sequence
    """
    masking = Masking(shape.head_dim**-0.5)
    attention = LayerAttention(
        LayerShape(shape.kv_heads, shape.head_dim, shape.head_dim), shape.heads, masking
    )
    kinds = dict.fromkeys(range(layers), attention)
    each = -(-max(stop for _, stop in parts) // BLOCK_TOKENS)
    count = len(parts)
    memory = PagedMemory(
        {index: kind.shape for index, kind in kinds.items()},
        blocks=count * each + 1,
        block_tokens=BLOCK_TOKENS,
        device=device,
        dtype=dtype,
    )
    for layer in range(layers):
        for pages in memory[layer]:
            pages.normal_()
    slots = Slots(count, each, spare=count * each, device=device)
    # The blocks of a sequence are spread over the memory, as they are after some hours.
    rows = [
        Row(
            blocks=range(index, count * each, count),
            start=start,
            stop=stop,
            ids=[0] * stop,
            prompt=1,
            sample=True,
            params=params,
            version=index + 1,
        )
        for index, (start, stop) in enumerate(parts)
    ]
    tokens = sum(stop - start for start, stop in parts)
    tile = 1 if tokens == count else tile_tokens(kinds, exact=exact, dtype=dtype)
    step_shape = StepShape(tokens, count, tile)
    packed = torch.zeros(packed_numbers(step_shape), dtype=torch.int32)
    numbers: Any = packed.numpy()
    fill(StepInputs.over(numbers, step_shape), rows, slots.begin_step(rows), slots, BLOCK_TOKENS)
    inputs = StepInputs.over(packed.to(device), step_shape)
    scratch = Scratch(kinds, max_rows=count, positions=each * BLOCK_TOKENS, device=device, exact=exact)
    return DeviceStep(rows, inputs, PagedAttention(memory, slots.tables, inputs, scratch), layers, masking)
