"""Attention of a device step over paged memory, with the kernels of `kernels.attention`.

Nothing here waits for the device or depends on the contents of a step, so CUDA can capture it as a graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from headrace.worker.engine.gpu.kernels.attention import Partials, attend, partial_numbers
from headrace.worker.engine.gpu.kernels.store import store
from headrace.worker.engine.gpu.kernels.tiling import SEGMENT, capability_of, tile_for
from headrace.worker.engine.gpu.step_inputs import StepInputs
from headrace.worker.engine.kv_memory import PagedMemory
from headrace.worker.engine.transformers_attention import LayerAttention, Masking

BLOCK_TOKENS = 32

# Fewer programs than this per multiprocessor do not keep the memory busy: then several share the keys of a
# row.
_FEWEST_PROGRAMS = 2
_WANTED_PROGRAMS = 4
_MOST_SCRATCH_BYTES = 256 << 20


def tile_tokens(
    layers: Mapping[int, LayerAttention], *, exact: bool, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Return how many tokens a query tile of mixed steps has; at least 1.

    exact   use a tile that multiplies as decodes do, so that a token has the same bits in both
    dtype   of queries, keys and values
    """
    tiles = []
    for layer in layers.values():
        shape = layer.shape
        group = layer.heads // shape.kv_heads
        tiles.append(tile_for(group, shape.key_dim, shape.value_dim, dtype.itemsize, exact=exact))
    return min(tiles)


class Scratch:
    """What the attention of all steps shares: memory for split rows, and choices that depend on the device.

    A step of few decodes has too few programs for the device, so several programs share the keys of each row.
    Whether they do depends on the shape of the step and never on the lengths of its rows.

    layers           the attention of each layer
    max_rows         most rows of a step of decodes
    positions        tokens of the longest row
    exact            whether a token must have the same bits in every step
    multiprocessors  of the device; None asks the device
    """

    def __init__(
        self,
        layers: Mapping[int, LayerAttention],
        *,
        max_rows: int,
        positions: int,
        device: torch.device,
        exact: bool = False,
        multiprocessors: int | None = None,
    ) -> None:
        self.exact = exact
        self.capability = capability_of(device)
        self._segments = -(-positions // SEGMENT)
        if multiprocessors is None:
            multiprocessors = 1
            if device.type != "cpu":
                multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._multiprocessors = multiprocessors
        shapes = {(layer.heads, layer.shape.kv_heads, layer.shape.value_dim) for layer in layers.values()}
        numbers = [
            partial_numbers(rows, heads, value_dim, self._segments)
            for heads, kv_heads, value_dim in shapes
            for rows in range(1, max_rows + 1)
            if self._programs(rows, heads, kv_heads, value_dim) > 1
        ]
        self._memory = torch.empty(max(numbers, default=0), dtype=torch.float32, device=device)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of memory of the device."""
        return self._memory.nbytes

    def partials(self, rows: int, heads: int, kv_heads: int, value_dim: int) -> Partials | None:
        """Return the memory for a step of *rows* decodes; None if one program computes a row and key head."""
        programs = self._programs(rows, heads, kv_heads, value_dim)
        return Partials(self._memory, self._segments, programs) if programs > 1 else None

    def _programs(self, rows: int, heads: int, kv_heads: int, value_dim: int) -> int:
        """Return how many programs share a row and key head."""
        unsplit = rows * kv_heads
        if unsplit >= _FEWEST_PROGRAMS * self._multiprocessors:
            return 1
        if partial_numbers(rows, heads, value_dim, self._segments) * 4 > _MOST_SCRATCH_BYTES:
            return 1
        return min(-(-_WANTED_PROGRAMS * self._multiprocessors // unsplit), self._segments)


class PagedAttention:
    """Computes attention in all layers of a step; implements `StepAttention`.

    memory    its blocks have any number of tokens; BLOCK_TOKENS suits it
    tables    [slots, width] int32: the blocks of the sequence in each slot, on the device
    step      on the device. Its tensors may be refilled for another step of the same shape
    """

    def __init__(self, memory: PagedMemory, tables: torch.Tensor, step: StepInputs, scratch: Scratch) -> None:
        self._memory = memory
        self._tables = tables
        self._step = step
        self._scratch = scratch

    def __call__(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, masking: Masking
    ) -> torch.Tensor:
        """See `StepAttention`; any strides."""
        store(keys, values, *self._memory[layer], self._step.where)
        # Zeros for padding: some networks, such as those with experts, must not compute with arbitrary
        # numbers.
        out = query.new_zeros(*query.shape[:2], values.shape[2])
        self.attend(layer, query, masking, out)
        return out

    def attend(self, layer: int, query: torch.Tensor, masking: Masking, out: torch.Tensor) -> None:
        """Compute attention of tokens whose keys and values are stored.

        query   [tokens, heads, key_dim], rotated; any strides
        out     [tokens, heads, value_dim], written except for padding; any strides
        """
        shape, step = self._memory.layers[layer], self._step.shape
        partials = None
        if step.decodes:
            partials = self._scratch.partials(step.rows, query.shape[1], shape.kv_heads, shape.value_dim)
        attend(
            query,
            *self._memory[layer],
            self._tables,
            self._step,
            masking,
            out,
            segmented=self._scratch.exact or step.tile == 1,
            partials=partials,
            capability=self._scratch.capability,
        )
