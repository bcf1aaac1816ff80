"""How a gguf file says that queries and keys are rotated, also where that is scaled for long contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from headrace.worker.engine.load.gguf.metadata import Factors, Metadata
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel

# How llama.cpp's converter makes the factors of Llama 3.x; the file keeps only the result.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_rotation(metadata: Metadata, rotated: int, context: int, *, theta: float) -> dict[str, Any]:
    """Read how queries and keys are rotated, as transformers' `rope_parameters`.

    rotated   how many numbers of a head are rotated
    context   tokens that the model can hold
    theta     base of the frequencies where the file names none
    """
    base = float(metadata.get("rope.freq_base", theta))
    factor = float(metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 0.0))) or 1.0
    original = int(metadata.get("rope.scaling.original_context_length", 0)) or None
    amplify = float(
        metadata.get("rope.scaling.attn_factor", metadata.get("rope.scaling.yarn_attn_factor", 1.0))
    )
    metadata.get("rope.scaling.finetuned", False)  # says how the model was trained, and changes nothing
    metadata.allow("rope.scaling.alpha", 0.0)
    metadata.allow("rope.scaling.yarn_log_multiplier", 0.0)
    metadata.allow("rope.scaling.yarn_ext_factor", -1.0, 1.0)
    fast = float(metadata.get("rope.scaling.yarn_beta_fast", 32.0))
    slow = float(metadata.get("rope.scaling.yarn_beta_slow", 1.0))
    kind = metadata.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModel(f"{metadata.architecture}.rope.scaling.type is {kind}, which is not read")
    if kind == "none":
        factor = 1.0
    if not all(map(math.isfinite, (base, factor, amplify))) or base <= 0 or factor <= 0:
        raise LoadingError(f"its rotation has base {base} and factor {factor}; the file is damaged")
    plain = {"rope_type": "default", "rope_theta": base}
    own = metadata.factors.get("rope_freqs.weight")
    if "rope_factors_long.weight" in metadata.factors or "rope_factors_short.weight" in metadata.factors:
        long, short = (metadata.factors.get(f"rope_factors_{name}.weight") for name in ("long", "short"))
        if own is not None or kind == "yarn" or factor != 1.0 or long is None or short is None:
            raise UnsupportedModel("its rotation is scaled in two ways at once, which is not read")
        return _by_factors(base, short, long, original or context, amplify, rotated)
    if kind == "longrope" and own is None:
        raise LoadingError("its rotation is scaled by longrope, but it lacks rope_factors_long.weight")
    if kind == "yarn" and own is None:
        if original is None:
            raise LoadingError("its rotation is scaled by yarn, but it has no original_context_length")
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
        raise UnsupportedModel("its rotation is scaled in two ways at once, which is not read")
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
    """Divide each frequency by a factor of its own."""
    for factors in (short, long):
        if factors.shape != (rotated // 2,) or not np.isfinite(factors).all() or (factors <= 0).any():
            raise LoadingError(f"the factors of its rotation are not {rotated // 2} numbers above 0")
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
    """Return what llama.cpp's converter divides each frequency of Llama 3.x by."""
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, rotated, 2) / rotated)
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: Factors = 1.0 / ((1 - smooth) / factor + smooth)
    return factors
