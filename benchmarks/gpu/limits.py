"""What the hardware allows at most, from the card's bandwidth and measured matrix products, and our goals.

A decode step reads all weights once and the keys and values of all its tokens' sequences; a prefill step is
bound by its matrix products. Everything else (activations, sampling, launches) counts as our own overhead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.shapes import Shape

BYTES = 2  # of a number in bfloat16

# Goals as shares of the limit, at least and good, by model and rows of the step.
DECODE = {
    ("llama-3-8b", 1): (0.65, 0.75),
    ("llama-3-8b", 32): (0.60, 0.70),
    ("llama-3-8b", 256): (0.55, 0.65),
    ("qwen2.5-0.5b", 1): (0.25, 0.40),
    ("qwen2.5-0.5b", 256): (0.30, 0.45),
}
PREFILL = {"llama-3-8b": (0.60, 0.70)}
WORKLOAD = {"qwen3-0.6b": (0.55, 0.65), "qwen2.5-0.5b": (0.25, 0.35)}
MESH = {"llama-3-8b": (0.97, 0.98), "qwen3-0.6b": (0.90, 0.95)}  # over the engine alone
EXACT = (0.70, 0.85)  # over the fast mode
PEER = (4.0, 6.0)  # over transformers' continuous batching


@dataclass(frozen=True)
class Ceilings:
    """What the card can do.

    bandwidth   bytes per second of its memory: of its data sheet, or that a copy reads and writes
    flops       floating point operations per second of a large matrix product in bfloat16
    """

    bandwidth: float
    flops: float

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Ceilings | None:
        """Return those that the part `card` has measured; None if it has not run."""
        if "bandwidth" not in facts or "flops" not in facts:
            return None
        return cls(facts["bandwidth"], facts["flops"])


def decode_tokens_per_second(shape: Shape, ceilings: Ceilings, rows: int, context: int) -> float:
    """Return the highest possible rate of steps of *rows* decodes, in tokens per second of all rows."""
    read = BYTES * (shape.weights + rows * context * shape.kv_numbers)
    computed = 2 * rows * shape.weights
    return rows / max(read / ceilings.bandwidth, computed / ceilings.flops)


def prefill_tokens_per_second(shape: Shape, ceilings: Ceilings) -> float:
    """Return the highest possible rate of prefill; attention and the head are not counted."""
    return ceilings.flops / (2 * shape.layers * shape.layer_weights)


def workload_tokens_per_second(shape: Shape, ceilings: Ceilings, lengths: Sequence[tuple[int, int]]) -> float:
    """Return the highest possible rate of output tokens, if all requests run at the same time.

    lengths   tokens of prompt and answer of each request
    """
    prompts = sum(prompt for prompt, _ in lengths)
    answers = sum(answer for _, answer in lengths)
    # Each answer token reads the keys and values of all tokens before it.
    attended = sum(answer * (prompt + answer / 2) for prompt, answer in lengths)
    steps = max(answer for _, answer in lengths)
    read = BYTES * (steps * shape.weights + attended * shape.kv_numbers)
    prefill = prompts / prefill_tokens_per_second(shape, ceilings)
    return answers / (prefill + read / ceilings.bandwidth)
