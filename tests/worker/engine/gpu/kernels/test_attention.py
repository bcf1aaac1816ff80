"""The attention kernels against plain attention in float32, and against themselves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from headrace.worker.engine.gpu.kernels.attention import Partials, attend, partial_numbers
from headrace.worker.engine.gpu.kernels.tiling import capability_of, tile_for, tiling
from headrace.worker.engine.transformers_attention import LayerAttention, Masking
from tests.worker.engine.gpu.device import DEVICE, DTYPES
from tests.worker.engine.gpu.kernels.steps import Row, Step, layer_of

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}

BORDERS = [1, 2, 31, 32, 33, 64, 255, 256, 257, 513]
DECODES = [Row(stop - 1, stop, seed) for seed, stop in enumerate(BORDERS)]
CHUNKS = [Row(0, 5, 1), Row(0, 33, 2), Row(250, 260, 3), Row(511, 513, 4), Row(40, 41, 5)]


def compute(
    step: Step, masking: Masking | None = None, *, segmented: bool = True, programs: int = 0
) -> torch.Tensor:
    """Return the attention of all tokens but padding; several programs share a row if *programs* is given."""
    layer, tables = step.layer, step.tables
    value_dim = layer.shape.value_dim
    partials = None
    if programs:
        segments = 4
        numbers = partial_numbers(len(step.inputs.slots), layer.heads, value_dim, segments)
        partials = Partials(torch.full((numbers,), float("nan"), device=DEVICE), segments, programs)
    out = torch.full((len(step.query), layer.heads, value_dim), 7.0, dtype=step.query.dtype, device=DEVICE)
    attend(
        step.query, *step.memory[0], tables, step.inputs, masking or layer.masking, out,
        segmented=segmented, partials=partials, capability=capability_of(DEVICE),
    )  # fmt: skip
    tokens = int(step.inputs.offsets[-1])
    assert (out[tokens:] == 7.0).all(), "padding is not written"
    return out[:tokens]


def check(step: Step, masking: Masking | None = None, *, segmented: bool = True, programs: int = 0) -> None:
    """Compare with plain attention."""
    out = compute(step, masking, segmented=segmented, programs=programs)
    torch.testing.assert_close(
        out.float(), step.expected(masking or step.layer.masking), rtol=0, atol=TOLERANCE[out.dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("programs", [0, 2])
def test_decodes_attend_to_all_keys_on_either_side_of_each_border(dtype: torch.dtype, programs: int) -> None:
    check(Step(DECODES, layer_of(2, 1, 16), padding=2, dtype=dtype), programs=programs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("tile", [5, 16])
def test_chunks_of_rows_attend_to_earlier_tokens_only(dtype: torch.dtype, segmented: bool, tile: int) -> None:
    check(Step(CHUNKS, layer_of(4, 2, 16), tile=tile, padding=3, dtype=dtype), segmented=segmented)


@pytest.mark.parametrize("group", [1, 3, 7, 8])
@pytest.mark.parametrize("segmented", [False, True])
def test_query_heads_share_the_keys_of_their_group(group: int, segmented: bool) -> None:
    layer = layer_of(2 * group, 2, 16)

    check(Step([Row(0, 3), Row(60, 66, 1)], layer, tile=5), segmented=segmented)
    check(Step([Row(2, 3), Row(256, 257)], layer), programs=2 * segmented)


@pytest.mark.parametrize(
    ("key_dim", "value_dim"),
    [
        (8, 8),
        (16, 16),
        (24, 24),
        (64, 64),
        (72, 72),
        (80, 80),
        (128, 128),
        (192, 128),
        (256, 256),
        (512, 512),
    ],
)
def test_heads_of_any_dimension_up_to_512_are_supported(key_dim: int, value_dim: int) -> None:
    layer = layer_of(2, 1, key_dim, value_dim)

    half = DTYPES[-1]
    decodes = [Row(69, 70), Row(299, 300)]
    check(Step([Row(0, 3), Row(66, 70)], layer, tile=4), segmented=False)
    check(Step(decodes, layer, dtype=half))
    check(Step(decodes, layer, dtype=half), programs=2)


@pytest.mark.parametrize("dim", [64, 128])
def test_the_largest_query_tiles_of_mixed_steps_attend_alike(dim: int) -> None:
    """They have 128 lines: on compute capability 9.0, four warps multiply them together."""
    half = DTYPES[-1]
    tile = tile_for(4, dim, dim, half.itemsize, exact=False)
    rows = [Row(0, 33, 2), Row(250, 260, 3), Row(299, 301, 4)]

    check(Step(rows, layer_of(4, 1, dim), tile=tile, padding=3, dtype=half), segmented=False)


@pytest.mark.parametrize("window", [1, 33, 257])
def test_a_window_hides_the_keys_before_it(window: int) -> None:
    masking = Masking(0.25, window=window)
    layer = layer_of(2, 1, 16)

    check(Step(DECODES[-4:], layer), masking)
    check(Step(DECODES[-4:], layer), masking, programs=2)
    for segmented in (False, True):
        check(Step(CHUNKS, layer, tile=16), masking, segmented=segmented)


@pytest.mark.parametrize("window", [None, 40])
def test_a_soft_cap_bounds_products(window: int | None) -> None:
    masking = Masking(2.0, softcap=3.0, window=window)
    layer = layer_of(4, 2, 16)

    check(Step(DECODES[-2:], layer), masking)
    check(Step(CHUNKS[:3], layer, tile=8), masking, segmented=False)


def test_products_beyond_the_range_of_exponents_stay_finite() -> None:
    layer = layer_of(2, 1, 16)
    step = Step([Row(0, 40), Row(299, 300)], layer, tile=8)
    step.query[:40] *= 1e4

    for masking in (Masking(1.0), Masking(1.0, softcap=30.0), Masking(1.0, window=7)):
        for segmented in (False, True):
            assert compute(step, masking, segmented=segmented).isfinite().all()


def test_strided_queries_and_outputs_are_computed_in_place() -> None:
    layer = layer_of(4, 2, 16)
    step = Step([Row(0, 5), Row(40, 42)], layer, tile=4)
    expected = compute(step)
    for order in ((1, 0, 2), (2, 1, 0), (0, 2, 1)):
        back = [order.index(dim) for dim in range(3)]
        step.query = step.query.permute(order).contiguous().permute(back)
        out = torch.empty_like(step.query.permute(order).contiguous()).permute(back)
        attend(
            step.query,
            *step.memory[0],
            step.tables,
            step.inputs,
            layer.masking,
            out,
            segmented=True,
            capability=capability_of(DEVICE),
        )

        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("layer", "window"),
    [(layer_of(4, 2, 16), None), (layer_of(7, 1, 24), 300), (layer_of(3, 3, 16, 32), 20)],
    ids=["groups of 2", "a group of 7", "groups of 1"],
)
def test_a_segmented_token_has_the_same_bits_alone_batched_split_and_in_a_chunk(
    layer: LayerAttention, window: int | None
) -> None:
    def bits(rows: Sequence[Row], *, programs: int = 0, **options: int) -> torch.Tensor:
        return compute(Step(rows, layer, dtype=DTYPES[-1], **options), masking, programs=programs)

    masking = Masking(0.25, window=window)
    shape = layer.shape
    tile = tile_for(
        layer.heads // shape.kv_heads, shape.key_dim, shape.value_dim, DTYPES[-1].itemsize, exact=True
    )
    rows = [Row(255, 258, 1), Row(31, 33, 2), Row(512, 513, 3)]
    decodes = [Row(at, at + 1, row.seed) for row in rows for at in range(row.start, row.stop)]

    alone = torch.cat([bits([decode]) for decode in decodes])

    assert torch.equal(bits(decodes, padding=3), alone)
    assert torch.equal(bits(decodes, programs=1), alone)
    assert torch.equal(bits(decodes, programs=2), alone)
    assert torch.equal(bits(rows, tile=tile, padding=1), alone)


def test_decodes_and_exact_chunks_have_the_same_tiling() -> None:
    for capability in (80, 86, 90):
        for group in (1, 2, 3, 4, 6, 7, 8, 16, 20):
            for dim in (64, 96, 128, 256):
                tile = tile_for(group, dim, dim, 2, exact=True)

                assert tiling(tile, group, dim, dim, 2, capability) == tiling(
                    1, group, dim, dim, 2, capability
                )


def test_a_row_that_is_not_a_number_does_not_affect_others() -> None:
    layer = layer_of(4, 2, 16)
    rows = [Row(0, 5), Row(40, 42)]
    expected = compute(Step(rows, layer, tile=4))
    step = Step(rows, layer, tile=4)
    step.query[2] = float("nan")  # in the first row

    out = compute(step)

    assert out[2].isnan().all()
    assert torch.equal(out[5:], expected[5:])
