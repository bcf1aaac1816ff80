"""Build the engine of a GPU from a loaded model: the only place that knows how its parts fit together.

Everything that imports Triton is imported inside the functions: a worker on a CPU neither needs nor has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from headrace.worker.engine.attention_kinds import AttentionKind, Layers
from headrace.worker.engine.interface import Grammars, ModelInfo
from headrace.worker.engine.load.devices import Plan
from headrace.worker.engine.load.self_check import SEQUENCES, Sizes

if TYPE_CHECKING:
    from headrace.worker.engine.gpu.engine import GpuEngine

# Tokens of mixed steps in which an exact engine is compared with itself: below, at and above the sizes at
# which matrix kernels change, and with a partial tile.
_CHECKED_TOKENS = (17, 33, 64, 128, 257, 512)
_FEWEST_CHECKED = 2 * SEQUENCES  # sequences that the engine of the check can run, whatever is served


def prepare(network: Any, layers: Layers, plan: Plan, progress: Callable[[str], None]) -> Any:
    """Lay out a network's weights for a `GpuDecoder`, and return them.

    Returns None if the code of transformers has to compute the network; in an exact engine, with linear
    layers that do not depend on the batch.
    """
    from headrace.worker.engine.gpu.decoder import GpuDecoderWeights, unsupported_reason
    from headrace.worker.engine.gpu.network_forward import make_exact

    reason = unsupported_reason(type(network).__name__, network.config)
    if not reason:
        progress("laying out weights")
        return GpuDecoderWeights(network, layers, positions=plan.positions)
    progress(f"layers of transformers, which are slower: {reason}")
    if plan.exact:
        make_exact(network)
    return None


def build_gpu_engine(
    model: ModelInfo,
    plan: Plan,
    *,
    network: Any,
    weights: Any,
    layers: Layers,
    kind: AttentionKind,
    dtype: torch.dtype,
    progress: Callable[[str], None],
    graphs: bool = True,
    grammars: Grammars | None = None,
) -> GpuEngine:
    """Allocate KV memory for a model, and build its engine.

    network       computes if *weights* is None
    weights       from `prepare`
    layers        the attention of each layer, which *kind* computes
    dtype         of keys and values
    graphs        compute steps as CUDA graphs, if the device is one of CUDA and the model can be captured
    grammars      of the model's vocabulary; None to support none
    """
    from headrace.worker.engine.gpu import cuda
    from headrace.worker.engine.gpu.decoder import GpuDecoder
    from headrace.worker.engine.gpu.engine import GpuEngine
    from headrace.worker.engine.gpu.network_forward import NetworkForward
    from headrace.worker.engine.gpu.paged_attention import Scratch, tile_tokens
    from headrace.worker.engine.gpu.slots import Slots

    device = plan.target.device
    memory = kind.make_memory(layers, model.kv_blocks)  # and a spare block, the last
    width = -(-plan.positions // model.block_tokens)
    slots = Slots(model.max_running, width, spare=model.kv_blocks, device=device)
    scratch = Scratch(
        layers,
        max_rows=model.max_running,
        positions=plan.positions,
        device=device,
        exact=plan.exact,
    )
    forward: GpuDecoder | NetworkForward
    if weights is not None:
        forward = GpuDecoder(weights, memory, slots.tables, scratch, exact=plan.exact)
    else:
        forward = NetworkForward(network, memory, slots.tables, scratch)
    pool = None
    if graphs and device.type != "cpu":
        progress("capturing CUDA graphs")
        pool = cuda.GraphPool(device)
    engine = GpuEngine(
        forward,
        model,
        slots=slots,
        step_tokens=plan.step_tokens,
        tile=tile_tokens(layers, exact=plan.exact, dtype=dtype),
        graphs=pool,
        grammars=grammars,
    )
    if engine.uncaptured:
        progress(f"steps are computed without CUDA graphs, which is slower: {engine.uncaptured}")
    return engine


def checked_rows(model: ModelInfo) -> int:
    """Return how many sequences the engine of the check of a batch-invariant model must be able to run."""
    return max(model.max_running, _FEWEST_CHECKED)


def checked_sizes(model: ModelInfo, step_tokens: int) -> Sizes:
    """Return the sizes of steps in which a batch-invariant engine must give the same results.

    They are all the sizes of decodes that are captured, and numbers of tokens with prompts up to
    *step_tokens*.
    """
    from headrace.worker.engine.gpu.graphs import decode_sizes

    tokens = [size for size in _CHECKED_TOKENS if size < step_tokens]
    return Sizes(rows=decode_sizes(checked_rows(model)), tokens=[*tokens, step_tokens])
