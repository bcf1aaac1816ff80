"""Read the rotary position embedding (rope) of a gguf file, with its scaling for long contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from headrace.worker.engine.load.gguf.metadata import Factors, Metadata
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel

# The parameters from which llama.cpp's converter computes the factors of Llama 3.x; the file has only the
# factors.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_rotation(metadata: Metadata, rotated: int, context: int, *, theta: float) -> dict[str, Any]:
    """Read the rope as transformers' `rope_parameters`.

    rotated   number of rotated dimensions of a head
    context   longest sequence that the model supports, in tokens
    theta     default base of the frequencies
    """
    base = float(metadata.get("rope.freq_base", theta))
    factor = float(metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 0.0))) or 1.0
    original = int(metadata.get("rope.scaling.original_context_length", 0)) or None
    amplify = float(
        metadata.get("rope.scaling.attn_factor", metadata.get("rope.scaling.yarn_attn_factor", 1.0))
    )
    metadata.get("rope.scaling.finetuned", False)  # describes the training; does not change results
    metadata.allow("rope.scaling.alpha", 0.0)
    metadata.allow("rope.scaling.yarn_log_multiplier", 0.0)
    metadata.allow("rope.scaling.yarn_ext_factor", -1.0, 1.0)
    fast = float(metadata.get("rope.scaling.yarn_beta_fast", 32.0))
    slow = float(metadata.get("rope.scaling.yarn_beta_slow", 1.0))
    kind = metadata.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModel(f"{metadata.architecture}.rope.scaling.type is {kind}, which is not supported")
    if kind == "none":
        factor = 1.0
    if not all(map(math.isfinite, (base, factor, amplify))) or base <= 0 or factor <= 0:
        raise LoadingError(f"its rope has base {base} and factor {factor}; the file is damaged")
    plain = {"rope_type": "default", "rope_theta": base}
    own = metadata.factors.get("rope_freqs.weight")
    if "rope_factors_long.weight" in metadata.factors or "rope_factors_short.weight" in metadata.factors:
        long, short = (metadata.factors.get(f"rope_factors_{name}.weight") for name in ("long", "short"))
        if own is not None or kind == "yarn" or factor != 1.0 or long is None or short is None:
            raise UnsupportedModel("its rope is scaled in two ways at once, which is not supported")
        return _by_factors(base, short, long, original or context, amplify, rotated)
    if kind == "longrope" and own is None:
        raise LoadingError("its rope is scaled by longrope, but it lacks rope_factors_long.weight")
    if kind == "yarn" and own is None:
        if original is None:
            raise LoadingError("its rope is scaled by yarn, but it has no original_context_length")
        attention = amplify * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
        return plain | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": fast,
            "beta_slow": slow,
            "attention_factor": attention,
        }
    if amplify != 1.0 or (own is not None and kind == "yarn"):
        raise UnsupportedModel("its rope is scaled in two ways at once, which is not supported")
    if own is not None:
        llama3 = {**plain, "rope_type": "llama3", "factor": float(own.max()) * factor, **_LLAMA3}
        if (
            factor == 1.0
            and own.shape == (rotated // 2,)
            and np.allclose(own, _llama3_factors(llama3, rotated))
        ):
            return llama3
        return _by_factors(base, own * factor, own * factor, context, 1.0, rotated)
    return plain if factor == 1.0 else plain | {"rope_type": "linear", "factor": factor}


def _by_factors(
    base: float, short: Factors, long: Factors, original: int, attention: float, rotated: int
) -> dict[str, Any]:
    """Make rope parameters with one factor per frequency."""
    for factors in (short, long):
        if factors.shape != (rotated // 2,) or not np.isfinite(factors).all() or (factors <= 0).any():
            raise LoadingError(f"its rope factors are not {rotated // 2} numbers above 0")
    return {
        "rope_type": "longrope",
        "rope_theta": base,
        "factor": 1.0,
        "attention_factor": attention,
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": original,
    }


def _llama3_factors(rope: Mapping[str, Any], rotated: int) -> Factors:
    """Return the factors by which llama.cpp's converter divides the frequencies of Llama 3.x."""
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, rotated, 2) / rotated)
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: Factors = 1.0 / ((1 - smooth) / factor + smooth)
    return factors
