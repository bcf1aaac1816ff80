"""Steps of a GPU engine, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from headrace.worker.engine.gpu.step_inputs import UNUSED, StepInputs, StepShape, zeros
from headrace.worker.engine.kv_memory import PagedMemory


@dataclass(frozen=True, slots=True)
class Part:
    """A row of a step: the tokens of a sequence from *start* to before *stop*."""

    slot: int
    ids: Sequence[int]
    start: int
    stop: int


def step_of(parts: Sequence[Part], shape: StepShape, memory: PagedMemory, tables: torch.Tensor) -> StepInputs:
    """Return the inputs of a step, where the tables are; what is missing in *shape* is padding."""
    step = zeros(shape, torch.device("cpu"))
    tables, device = tables.cpu(), tables.device
    spare_slot, spare_block = len(tables) - 1, memory.blocks - 1
    step.slot_of.fill_(spare_slot)
    step.where.fill_(spare_block * memory.block_tokens)
    step.slots.fill_(spare_slot)
    step.tile_rows.fill_(UNUSED)
    begin = tile = 0
    for row, part in enumerate(parts):
        positions = torch.arange(part.start, part.stop)
        end = begin + len(positions)
        step.ids[begin:end] = torch.tensor(part.ids[part.start : part.stop])
        step.positions[begin:end] = positions
        step.slot_of[begin:end] = part.slot
        blocks = tables[part.slot][positions // memory.block_tokens]
        step.where[begin:end] = blocks * memory.block_tokens + positions % memory.block_tokens
        step.slots[row], step.offsets[row] = part.slot, begin
        step.starts[row], step.stops[row], step.last[row] = part.start, part.stop, end - 1
        for offset in range(begin, end, shape.tile):
            step.tile_rows[tile], step.tile_offsets[tile] = row, offset
            tile += 1
        begin = end
    step.offsets[len(parts) :] = begin
    moved = {
        field.name: getattr(step, field.name).to(device) for field in fields(step) if field.name != "shape"
    }
    return StepInputs(shape, **moved)
