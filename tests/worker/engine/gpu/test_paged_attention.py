"""Attention of device steps: which programs compute a step, and what they store and read."""

from __future__ import annotations

import pytest
import torch

from headrace.worker.engine.gpu.kernels.attention import partial_numbers
from headrace.worker.engine.gpu.paged_attention import PagedAttention, Scratch, tile_tokens
from headrace.worker.engine.transformers_attention import LayerAttention
from tests.worker.engine.gpu.device import DEVICE
from tests.worker.engine.gpu.kernels.steps import Row, Step, layer_of

LAYER = layer_of(4, 2, 16)


def scratch_of(
    layer: LayerAttention = LAYER,
    *,
    max_rows: int = 8,
    positions: int = 600,
    multiprocessors: int = 1,
    exact: bool = False,
) -> Scratch:
    return Scratch(
        {0: layer},
        max_rows=max_rows,
        positions=positions,
        device=DEVICE,
        exact=exact,
        multiprocessors=multiprocessors,
    )


def test_a_call_stores_keys_and_values_before_it_attends() -> None:
    rows = [Row(30, 40, 1), Row(0, 3, 2), Row(68, 69, 3)]
    step = Step(rows, LAYER, tile=4, padding=2)
    places, keys, values = [], [], []
    for index, row in enumerate(rows):
        places += step.places(index, row.start, row.stop)
        keys.append(step.keys[index][row.start :])
        values.append(step.values[index][row.start :])
    spare = step.memory.blocks * 32 - 1
    step.inputs.where[:] = torch.tensor([*places, spare, spare], device=DEVICE)
    for pages in step.memory[0]:
        pages.view(-1, *pages.shape[2:])[places] = float("nan")
    padding = torch.full((2, 2, 16), float("nan"), device=DEVICE)

    attention = PagedAttention(step.memory, step.tables, step.inputs, scratch_of())
    out = attention(0, step.query, torch.cat([*keys, padding]), torch.cat([*values, padding]), LAYER.masking)

    torch.testing.assert_close(out[:-2], step.expected(LAYER.masking), rtol=0, atol=1e-5)
    assert (out[-2:] == 0).all(), "finite for padding too"


@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_exact_steps_of_all_kinds_agree_bit_for_bit(multiprocessors: int) -> None:
    scratch = scratch_of(multiprocessors=multiprocessors, exact=True)

    def bits(rows: list[Row], tile: int) -> torch.Tensor:
        step = Step(rows, LAYER, tile=tile)
        out = torch.empty(len(step.query), 4, 16, device=DEVICE)
        PagedAttention(step.memory, step.tables, step.inputs, scratch).attend(
            0, step.query, LAYER.masking, out
        )
        return out

    tile = tile_tokens({0: LAYER}, exact=True)
    decodes = [Row(at, at + 1, 1) for at in (255, 256, 257)]

    alone = torch.cat([bits([decode], 1) for decode in decodes])

    assert torch.equal(bits(decodes, 1), alone)
    assert torch.equal(bits([Row(255, 258, 1)], tile), alone)


def test_few_decodes_are_split_among_programs_and_many_are_not() -> None:
    scratch = scratch_of(layer_of(32, 8, 128), max_rows=256, positions=8192, multiprocessors=132)

    def programs(rows: int) -> int:
        partials = scratch.partials(rows, 32, 8, 128)
        return partials.programs if partials else 1

    assert programs(1) == 32, "no more than there are segments"
    assert programs(8) == 9
    assert programs(32) == 3
    assert programs(33) == programs(256) == 1


def test_the_scratch_holds_the_largest_split_step_and_is_bounded() -> None:
    layer = layer_of(32, 8, 128)
    split = scratch_of(layer, max_rows=256, positions=8192, multiprocessors=132)
    short = scratch_of(layer, max_rows=256, positions=256, multiprocessors=132)
    long = scratch_of(layer, max_rows=256, positions=1 << 20, multiprocessors=132)

    assert split.allocated_bytes == 4 * partial_numbers(32, 32, 128, 32)
    assert short.allocated_bytes == 0, "one segment"
    assert 0 < long.allocated_bytes <= 256 << 20
    assert long.partials(1, 32, 8, 128) is not None
    assert long.partials(32, 32, 8, 128) is None


@pytest.mark.parametrize(
    ("layer", "exact", "fast"),
    [
        (layer_of(32, 8, 128), 4, 32),
        (layer_of(14, 2, 64), 2, 18),
        (layer_of(32, 32, 96), 16, 128),
        (layer_of(16, 8, 256), 8, 32),
        (layer_of(64, 4, 128), 1, 8),
        (layer_of(71, 1, 64), 1, 1),
    ],
    ids=str,
)
def test_a_query_tile_has_as_many_tokens_as_its_lines_allow(
    layer: LayerAttention, exact: int, fast: int
) -> None:
    assert tile_tokens({0: layer}, exact=True) == exact
    assert tile_tokens({0: layer}, exact=False) == fast
    assert tile_tokens({0: layer}, exact=False, dtype=torch.float32) == exact


def test_the_layer_with_the_largest_groups_decides_the_tile() -> None:
    layers = {0: layer_of(8, 8, 64), 1: layer_of(8, 2, 64)}

    assert tile_tokens(layers, exact=True) == 4
