"""Each kind of attention over paged memory, against attention over whole sequences in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from headrace.worker.engine import attention_kinds
from headrace.worker.engine.attention_kinds import AttentionKind, choose_kind
from headrace.worker.engine.flat_step import flatten
from headrace.worker.engine.interface import Row, SamplingParams
from headrace.worker.engine.kv_memory import LayerShape
from headrace.worker.engine.load.refusals import UnsupportedModel
from headrace.worker.engine.transformers_attention import LayerAttention, Masking

CPU = torch.device("cpu")
PARAMS = SamplingParams(seed=0, max_tokens=1)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}

LAYERS = {
    "one head": LayerAttention(LayerShape(1, 16, 16), 1, Masking(0.25)),
    "groups of three": LayerAttention(LayerShape(3, 64, 64), 9, Masking(0.125)),
    "groups of seven": LayerAttention(LayerShape(2, 64, 64), 14, Masking(0.125)),
    "a group of sixteen": LayerAttention(LayerShape(1, 32, 32), 16, Masking(0.2)),
    "odd sizes": LayerAttention(LayerShape(2, 20, 20), 10, Masking(0.3)),
    "values of another size": LayerAttention(LayerShape(2, 48, 40), 4, Masking(0.15)),
    "wide heads, soft cap, window": LayerAttention(
        LayerShape(1, 256, 256), 2, Masking(0.06, softcap=3.0, window=40)
    ),
    "a window of one": LayerAttention(LayerShape(2, 16, 16), 4, Masking(0.25, window=1)),
}


def expected(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, masking: Masking) -> Any:
    """Return the attention of a whole sequence: query [tokens, heads, dim]."""
    group = query.shape[1] // keys.shape[1]
    query, keys, values = query.double(), keys.double(), values.double()
    keys, values = (tensor.repeat_interleave(group, 1) for tensor in (keys, values))
    products = torch.einsum("qhd,khd->hqk", query, keys) * masking.scale
    if masking.softcap is not None:
        products = torch.tanh(products / masking.softcap) * masking.softcap
    ahead = torch.arange(len(keys)) - torch.arange(len(query))[:, None]
    hidden = ahead > 0
    if masking.window is not None:
        hidden |= ahead <= -masking.window
    return torch.einsum("hqk,khd->qhd", products.masked_fill(hidden, float("-inf")).softmax(-1), values)


def kinds() -> list[Any]:
    made = [(attention_kinds.kernels(dtype), dtype) for dtype in (torch.float32, torch.bfloat16)]
    made += [(attention_kinds.plain(CPU, dtype), dtype) for dtype in (torch.float32, torch.float16)]
    return [pytest.param(kind, dtype, id=f"{kind.name} {dtype}") for kind, dtype in made]


@pytest.mark.parametrize(("kind", "dtype"), kinds())
@pytest.mark.parametrize("name", LAYERS)
@torch.inference_mode()
def test_ragged_steps_give_the_attention_of_whole_sequences(
    name: str, kind: AttentionKind, dtype: torch.dtype
) -> None:
    layer, dice = LAYERS[name], random.Random(name)
    shape, torch_dice = layer.shape, torch.Generator().manual_seed(3)
    lengths = [1, 31, 32, 33, 64, 150, 300]
    width = -(-max(lengths) // kind.block_tokens)
    numbers = dice.sample(range(len(lengths) * width), len(lengths) * width)
    tables = [numbers[i :: len(lengths)] for i in range(len(lengths))]
    memory = kind.make_memory({0: layer}, len(numbers))
    sequences = [
        [
            torch.randn(length, heads, dim, generator=torch_dice).to(dtype)
            for heads, dim in (
                (layer.heads, shape.key_dim),
                (shape.kv_heads, shape.key_dim),
                (shape.kv_heads, shape.value_dim),
            )
        ]
        for length in lengths
    ]
    seen: list[list[torch.Tensor]] = [[] for _ in lengths]
    computed = [0] * len(lengths)
    while computed != lengths:
        left = [i for i, length in enumerate(lengths) if computed[i] < length]
        chosen = dice.sample(left, dice.randint(1, len(left)))
        chunks = {i: min(dice.choice((1, 1, 2, 13, 40, 200)), lengths[i] - computed[i]) for i in chosen}
        rows = [
            Row(tables[i], computed[i], computed[i] + n, [0] * lengths[i], lengths[i], False, PARAMS)
            for i, n in chunks.items()
        ]
        step = [
            torch.cat([sequences[i][part][computed[i] : computed[i] + n] for i, n in chunks.items()])
            for part in range(3)
        ]
        padded = [torch.cat([tensor, tensor.new_zeros(2, *tensor.shape[1:])]) for tensor in step]
        assert kind.begin is not None
        out = kind.begin(memory, flatten(rows, kind.block_tokens))(0, *padded, layer.masking)  # type: ignore[call-arg,arg-type]
        assert out.dtype == dtype
        assert bool(torch.isfinite(out).all())
        begin = 0
        for i, n in chunks.items():
            seen[i].append(out[begin : begin + n])
            computed[i] += n
            begin += n

    for parts, own in zip(seen, sequences, strict=True):
        wanted = expected(*own, layer.masking)  # type: ignore[call-arg,arg-type]
        assert (torch.cat(parts).double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


def test_the_cpu_uses_kernels_for_the_dtypes_that_they_support() -> None:
    layers = {0: LAYERS["odd sizes"]}

    assert choose_kind(layers, CPU, torch.float32, gpu=False).name == "kernels"
    assert choose_kind(layers, CPU, torch.bfloat16, gpu=False).name == "kernels"
    other = choose_kind(layers, CPU, torch.float16, gpu=False)
    assert (other.name, other.reason) == ("plain", "our kernels hold float32 or bfloat16")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpus_use_their_kernels_for_all_heads_up_to_256(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    layers = {0: LAYERS[name]}

    kind = choose_kind(layers, CPU, dtype, gpu=True)

    assert (kind.name, kind.reason) == ("triton", "")
    memory = kind.make_memory(layers, 5)
    assert memory.blocks == 6  # padding is written to the last
    assert memory[0][0].nbytes + memory[0][1].nbytes == 6 * kind.block_bytes(layers)


def test_wider_heads_are_rejected_on_gpus() -> None:
    pytest.importorskip("triton")
    wide = LayerAttention(LayerShape(1, 64, 520), 2, Masking(0.06))

    with pytest.raises(UnsupportedModel, match=r"heads have 520 dimensions.*use --device cpu"):
        choose_kind({0: LAYERS["one head"], 1: wide}, CPU, torch.float16, gpu=True)
