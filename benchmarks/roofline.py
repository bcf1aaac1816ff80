"""What this machine could do at best: how fast it reads memory, how fast it multiplies a model's matrices.

Rates are the best of several tries, with the fastest kernel that torch has for the dtype: weights prepacked
for oneDNN in bfloat16, `_int_mm` in int8. An engine with kernels of its own may exceed them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_SLICES = 8


@dataclass(frozen=True)
class Shapes:
    """The linear layers of a model.

    layers       [outputs, inputs] of each linear layer, layer by layer, the head last
    kv_values    keys and values of one position, all layers together
    """

    layers: Sequence[tuple[int, int]]
    kv_values: int

    @property
    def weights(self) -> int:
        """Parameters that a step reads."""
        return sum(outputs * inputs for outputs, inputs in self.layers)


def shapes(config: Any) -> Shapes:
    """Read the shapes of a llama-like model from its config; projections of one input count as one."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    kv = config.num_key_value_heads * head
    each = [
        (heads * head + 2 * kv, hidden),
        (hidden, heads * head),
        (2 * config.intermediate_size, hidden),
        (hidden, config.intermediate_size),
    ]
    layers = each * config.num_hidden_layers + [(config.vocab_size, hidden)]
    return Shapes(layers, 2 * kv * config.num_hidden_layers)


def best(work: Callable[[], object]) -> float:
    """Seconds that *work* takes when it goes best."""
    work()
    times = []
    for _ in range(_SLICES):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def bandwidth() -> float:
    """Bytes per second that are read from memory, far beyond the caches."""
    block = torch.ones(1 << 27)
    return block.numel() * block.element_size() / best(block.sum)


def products(dtype: str, layers: Sequence[tuple[int, int]], rows: int) -> float:
    """Seconds to multiply *rows* rows by the weights of all layers once, each read from memory."""
    return best(_multiplier(dtype, layers, rows))


def _multiplier(dtype: str, layers: Sequence[tuple[int, int]], rows: int) -> Callable[[], object]:
    if dtype == "int8":
        integers = [torch.randint(-127, 127, shape, dtype=torch.int8) for shape in layers]
        # `_int_mm` wants more than 16 rows on some devices; on the CPU any number will do.
        fed = {inputs: torch.randint(-127, 127, (rows, inputs), dtype=torch.int8) for _, inputs in layers}
        return lambda: [torch._int_mm(fed[weight.shape[1]], weight.t()) for weight in integers]
    precision: torch.dtype = getattr(torch, dtype)
    weights = [torch.randn(shape).to(precision) for shape in layers]
    given = {inputs: torch.randn(rows, inputs).to(precision) for _, inputs in layers}
    mkldnn: Any = torch.ops.mkldnn
    if precision is torch.bfloat16 and hasattr(mkldnn, "_reorder_linear_weight"):
        packed = [(mkldnn._reorder_linear_weight(weight, rows), weight.shape[1]) for weight in weights]
        return lambda: [
            mkldnn._linear_pointwise(given[inputs], weight, None, "none", [], "") for weight, inputs in packed
        ]
    return lambda: [torch.nn.functional.linear(given[weight.shape[1]], weight) for weight in weights]
