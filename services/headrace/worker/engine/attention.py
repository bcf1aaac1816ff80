"""Attention over slots: one ragged step of many sequences through transformers' own modelling code.

transformers lets a model's attention be any registered function. Ours gets the queries, keys and
values of *all* tokens of a step, flattened into one row of length `total`, and a `StepPlan` that says
which token belongs to which sequence. It stores the new keys and values in their slots and attends
slot by slot. Nothing here knows which model calls; layers may differ in heads and dimensions.

Three shapes were chosen by measurement (torch 2.13, CPU, two threads, 9 or 14 query heads on 3 or 2
KV heads of 64, 300 tokens held):

- Decoding rows fold their query heads into the query length, [rows, kv_heads, group, dim]: 32 rows take
  0.9 ms in bfloat16 and 0.7 ms in float32, where `enable_gqa` takes 5 to 9 ms and 0.7 to 0.9 ms.
- A view of the first slots, strided and masked, stays on the flash kernel: nothing is copied.
- Lengths are rounded up to `rung`s and query rows to at least `MIN_ROWS`, so that a token's attention
  is bitwise the same alone, in a batch and in a prefill chunk. The matrix kernels below choose another
  order of additions for fewer than four rows, and the flash kernel cuts keys into blocks of 512.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from headrace.worker.engine.refusals import UnsupportedModel

if TYPE_CHECKING:
    from headrace.worker.engine.seam import Row

IMPLEMENTATION = "headrace"  # what transformers calls our attention function

MIN_ROWS = 4  # below this, CPU matrix kernels add up in another order
_BLOCK = 512  # keys per block of torch's CPU flash kernel
_CALL = 1024  # attending one row to so many keys costs about as much as one more kernel call

# Arguments that change what attention means and that we would have to ignore.
_UNSUPPORTED_ARGUMENTS = ("s_aux", "position_bias", "head_mask", "block_sequence_ids")


def rung(length: int) -> int:
    """Round a number of keys up to one at which results do not depend on the rounding.

    64, 128, then multiples of 512: within a block of the flash kernel, the float32 matrix kernel splits
    the sum over keys differently for 192 to 511 keys than for 512, but not for fewer.
    """
    if length <= 128:
        return -(-length // 64) * 64
    return -(-length // _BLOCK) * _BLOCK


class SlotMemory:
    """Keys and values of all layers: per layer two tensors [slots, length, kv_heads, head_dim].

    slots    running sequences it can hold
    length   tokens a slot can hold

    A layer's memory is made when the layer first stores something, for only then are its dimensions
    known. It starts as zeros, since what is masked must still be finite. On the CPU those zeros are
    pages that the system commits when they are first written: memory grows with use, up to
    `slots x length x bytes_per_token`, and stays. On CUDA all of it is taken at once.
    """

    def __init__(self, slots: int, length: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.slots = slots
        self.length = rung(length)
        self._device = device
        self._dtype = dtype
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def layers(self) -> frozenset[int]:
        """Indices of the layers that have stored something."""
        return frozenset(self._layers)

    def shape(self, layer: int) -> tuple[int, int]:
        """Return how many KV heads a layer has, and the dimension of a key."""
        keys, _ = self._layers[layer]
        return keys.shape[2], keys.shape[3]

    @property
    def bytes_per_token(self) -> int:
        """What one token takes in all layers together, in bytes; known once every layer has stored."""
        return sum(
            tensor.element_size() * tensor.shape[2] * tensor.shape[3]
            for layer in self._layers.values()
            for tensor in layer
        )

    def store(
        self, layer: int, where: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's keys and values, and return all that the layer holds.

        where         [tokens] int64, slot x length + position
        keys, values  [tokens, kv_heads, head_dim]
        """
        held = self._layers.get(layer)
        if held is None:
            held = self._layers[layer] = (self._zeros(keys), self._zeros(values))
        for memory, new in zip(held, (keys, values), strict=True):
            memory.view(-1, *memory.shape[2:]).index_copy_(0, where, new)
        return held

    def erase(self, slot: int, length: int) -> None:
        """Make the first *length* tokens of a slot zero again."""
        for layer in self._layers.values():
            for memory in layer:
                memory[slot, :length].zero_()

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        shape = (self.slots, self.length, *like.shape[1:])
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        # torch.zeros writes, and so commits, every page. Huge pages, which numpy asks for, would commit 2 MiB
        # for a slot's first token in every tensor: 120 MB and 0.3 s for each slot of a model of 30 layers.
        memory = mmap.mmap(-1, math.prod(shape) * self._dtype.itemsize)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(memory, dtype=self._dtype).view(shape)


@dataclass(frozen=True, slots=True)
class Decodes:
    """Neighbouring slots whose sequences compute one token each, attended in one call.

    tokens   where their tokens lie in the step, as a slice
    slots    the slots from the first to the last of them, holes included, as a slice
    gaps     [tokens] int64, each token's slot counted from the first; None when there are no holes
    length   keys to attend to, a rung
    last     [slots, 1, 1, 1] int64, the position of each slot's token; 0 in a hole
    """

    tokens: slice
    slots: slice
    gaps: torch.Tensor | None
    length: int
    last: torch.Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several tokens of one sequence.

    tokens      where they lie in the step, as a slice
    slot        where the sequence lives
    length      keys to attend to, a rung
    positions   [rows, 1] int64; rows is the number of tokens rounded up to 32, the rest repeats
    """

    tokens: slice
    slot: int
    length: int
    positions: torch.Tensor


@dataclass(slots=True)
class StepPlan:
    """Who is who in a step: passed through transformers to `slot_attention` untouched.

    where     [tokens] int64, where each token's keys and values go in the memory
    windows   each calling layer's sliding window: what the self-check looks at afterwards
    """

    memory: SlotMemory
    where: torch.Tensor
    decodes: list[Decodes]
    chunks: list[Chunk]
    windows: dict[int, int | None] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def mask(
        self, part: int, last: torch.Tensor, length: int, window: int | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return 0 where a query may look and -inf elsewhere, [*last.shape[:-1], length].

        part   numbers the decodes and chunks of the step: layers share masks
        last   [..., 1] int64, the query's own position, the last that it may look at
        """
        mask = self._masks.get((part, window))
        if mask is None:
            keys = torch.arange(length, device=last.device)
            hidden = keys > last
            if window is not None:
                hidden |= keys <= last - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=last.device)
            self._masks[part, window] = mask.masked_fill_(hidden, float("-inf"))
        return mask


def plan_step(rows: Sequence[Row], memory: SlotMemory, device: torch.device) -> StepPlan:
    """Lay out a step whose rows are in `step_order`, one after the other."""
    where: list[int] = []
    chunks: list[Chunk] = []
    singles: list[Row] = []
    for row in rows:
        begin = len(where)
        where.extend(range(row.slot * memory.length + row.start, row.slot * memory.length + row.stop))
        if row.stop - row.start == 1:
            singles.append(row)
            continue
        # Blocks of 32 query rows: a last block of fewer than MIN_ROWS would round differently.
        padded = -(-(row.stop - row.start) // 32) * 32
        positions = torch.arange(row.start, row.start + padded, device=device).clamp_(max=row.stop - 1)
        chunks.append(Chunk(slice(begin, len(where)), row.slot, rung(row.stop), positions[:, None]))
    return StepPlan(
        memory=memory,
        where=torch.tensor(where, dtype=torch.int64, device=device),
        decodes=[_decodes(run, begin, device) for begin, run in _runs(singles)],
        chunks=chunks,
    )


def step_order(rows: Sequence[Row]) -> list[int]:
    """Order rows as `plan_step` wants them: single tokens by slot, then longer chunks."""
    return sorted(range(len(rows)), key=lambda i: (rows[i].stop - rows[i].start > 1, rows[i].slot))


def _runs(singles: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    """Cut single-token rows, ordered by slot, into runs worth attending in one call each.

    Going on costs the holes between the slots and the difference in length; a new run costs a call.
    Returns each run with the index of its first row. A row's result does not depend on the cut.
    """
    runs: list[tuple[int, list[Row]]] = []
    longest = 0
    for index, row in enumerate(singles):
        own = rung(row.stop)
        if runs:
            run = runs[-1][1]
            held = run[-1].slot - run[0].slot + 1
            together = (row.slot - run[0].slot + 1) * max(longest, own)
            if together <= held * longest + own + _CALL:
                run.append(row)
                longest = max(longest, own)
                continue
        runs.append((index, [row]))
        longest = own
    return runs


def _decodes(run: Sequence[Row], begin: int, device: torch.device) -> Decodes:
    first, end = run[0].slot, run[-1].slot + 1
    last = [0] * (end - first)
    for row in run:
        last[row.slot - first] = row.start
    dense = len(run) == end - first
    return Decodes(
        tokens=slice(begin, begin + len(run)),
        slots=slice(first, end),
        gaps=None if dense else torch.tensor([row.slot - first for row in run], device=device),
        length=rung(max(row.stop for row in run)),
        last=torch.tensor(last, device=device).view(-1, 1, 1, 1),
    )


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    headrace_step: StepPlan | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks, over the slots; registered as `IMPLEMENTATION`.

    query            [1, heads, tokens, head_dim], rotated; key and value with kv_heads
    scaling          multiplies the products of queries and keys; None for 1 / sqrt(head_dim)
    softcap          bounds those products by softcap x tanh(product / softcap)
    sliding_window   a token sees itself and the sliding_window - 1 tokens before it; None for all

    Tokens past the plan's are padding, whose result is zero. Returns [1, tokens, heads, head_dim].
    Raises UnsupportedModel when the model asks for something else than causal attention.
    """
    if headrace_step is None:
        raise UnsupportedModel(f"{type(module).__name__} does not pass keyword arguments on to its attention")
    unknown = [name for name in _UNSUPPORTED_ARGUMENTS if arguments.get(name) is not None]
    if unknown or attention_mask is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} needs attention with {', '.join(unknown) or 'a mask'}"
        )
    if not arguments.get("is_causal", getattr(module, "is_causal", True)):
        raise UnsupportedModel(f"{type(module).__name__} looks ahead: its attention is not causal")
    plan, layer = headrace_step, int(module.layer_idx)  # type: ignore[arg-type]
    plan.windows[layer] = sliding_window
    real = plan.where.shape[0]
    keys, values = plan.memory.store(
        layer, plan.where, key[0].transpose(0, 1)[:real], value[0].transpose(0, 1)[:real]
    )
    heads, kv_heads, width = query.shape[1], key.shape[1], value.shape[3]
    group = heads // kv_heads
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    queries = query[0].transpose(0, 1)  # [tokens, heads, head_dim]
    out = query.new_zeros(query.shape[2], heads, width)
    for part, run in enumerate(plan.decodes):
        own = queries[run.tokens].reshape(-1, kv_heads, group, query.shape[3])
        if run.gaps is not None or group < MIN_ROWS:
            rows = run.slots.stop - run.slots.start
            padded = own.new_zeros(rows, kv_heads, max(group, MIN_ROWS), query.shape[3])
            padded[slice(None) if run.gaps is None else run.gaps, :, :group] = own
            own = padded
        mask = plan.mask(part, run.last, run.length, sliding_window, query.dtype)
        seen = _attend(
            own,
            keys[run.slots, : run.length].transpose(1, 2),
            values[run.slots, : run.length].transpose(1, 2),
            mask,
            scale,
            softcap,
        )[:, :, :group]
        out[run.tokens] = (seen if run.gaps is None else seen[run.gaps]).reshape(-1, heads, width)
    for part, chunk in enumerate(plan.chunks, start=len(plan.decodes)):
        tokens = chunk.tokens.stop - chunk.tokens.start
        own = query.new_zeros(heads, chunk.positions.shape[0], query.shape[3])
        own[:, :tokens] = query[0, :, chunk.tokens]
        # KV heads stand where rows stand in a batch, and each group shares its keys: nothing is copied.
        shared = (kv_heads, group, chunk.length, -1)
        mask = plan.mask(part, chunk.positions, chunk.length, sliding_window, query.dtype)
        seen = _attend(
            own.view(kv_heads, group, -1, query.shape[3]),
            keys[chunk.slot, : chunk.length].transpose(0, 1)[:, None].expand(shared),
            values[chunk.slot, : chunk.length].transpose(0, 1)[:, None].expand(shared),
            mask,
            scale,
            softcap,
        )
        out[chunk.tokens] = seen.reshape(heads, -1, width)[:, :tokens].transpose(0, 1)
    return out[None], None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attend [batch, heads, rows, dim] to [batch, heads, keys, dim]."""
    if softcap is None:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    # The fused kernels know no soft cap.
    products = torch.matmul(query, key.transpose(2, 3)) * scale
    products = torch.tanh(products / softcap) * softcap + mask
    return torch.matmul(torch.softmax(products, dim=-1, dtype=torch.float32).to(query.dtype), value)
