"""Read the rotary position embedding (rope) of a gguf file, with its scaling for long contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.worker.engine.load.gguf.metadata import Factors, Metadata
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel

# The parameters from which llama.cpp's converter computes the factors of Llama 3.x; the file has only the
# factors.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


_TWO_SCALINGS = "its rope is scaled in two ways at once, which is not supported"


@dataclass(frozen=True, slots=True)
class _Scaling:
    """The rope of a file as its keys define it.

    base            base of the frequencies
    type            none, linear, yarn or longrope
    factor          divides all frequencies
    original        context length before scaling; None if not specified
    amplification   factor of the queries and keys
    fast, slow      parameters of yarn
    """

    base: float
    type: str
    factor: float
    original: int | None
    amplification: float
    fast: float
    slow: float


def read_rope(metadata: Metadata, rotated: int, context: int, *, theta: float) -> dict[str, Any]:
    """Read the rope as transformers' `rope_parameters`.

    rotated   number of rotated dimensions of a head
    context   longest sequence that the model supports, in tokens
    theta     default base of the frequencies
    """
    scaling = _read_scaling(metadata, theta)
    factors, long, short = (
        metadata.factors.get(f"{name}.weight")
        for name in ("rope_freqs", "rope_factors_long", "rope_factors_short")
    )
    if long is not None or short is not None:
        if (
            factors is not None
            or scaling.type == "yarn"
            or scaling.factor != 1.0
            or long is None
            or short is None
        ):
            raise UnsupportedModel(_TWO_SCALINGS)
        original = scaling.original or context
        return _by_factors(scaling.base, short, long, original, scaling.amplification, rotated)
    if factors is not None:
        if scaling.amplification != 1.0 or scaling.type == "yarn":
            raise UnsupportedModel(_TWO_SCALINGS)
        return _by_common_factors(scaling, factors, context, rotated)
    if scaling.type == "longrope":
        raise LoadingError("its rope is scaled by longrope, but it lacks rope_factors_long.weight")
    if scaling.type == "yarn":
        return _yarn(scaling)
    if scaling.amplification != 1.0:
        raise UnsupportedModel(_TWO_SCALINGS)
    if scaling.factor == 1.0:
        return {"rope_type": "default", "rope_theta": scaling.base}
    return {"rope_type": "linear", "rope_theta": scaling.base, "factor": scaling.factor}


def _read_scaling(metadata: Metadata, theta: float) -> _Scaling:
    """Read all keys of the rope. Raises LoadingError or UnsupportedModel."""
    metadata.get("rope.scaling.finetuned", False)  # describes the training; does not change results
    metadata.allow("rope.scaling.alpha", 0.0)
    metadata.allow("rope.scaling.yarn_log_multiplier", 0.0)
    metadata.allow("rope.scaling.yarn_ext_factor", -1.0, 1.0)
    kind = metadata.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModel(f"{metadata.architecture}.rope.scaling.type is {kind}, which is not supported")
    factor = float(metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 0.0))) or 1.0
    yarn_amplification = metadata.get("rope.scaling.yarn_attn_factor", 1.0)
    scaling = _Scaling(
        base=float(metadata.get("rope.freq_base", theta)),
        type=kind,
        factor=1.0 if kind == "none" else factor,
        original=int(metadata.get("rope.scaling.original_context_length", 0)) or None,
        amplification=float(metadata.get("rope.scaling.attn_factor", yarn_amplification)),
        fast=float(metadata.get("rope.scaling.yarn_beta_fast", 32.0)),
        slow=float(metadata.get("rope.scaling.yarn_beta_slow", 1.0)),
    )
    if (
        not all(map(math.isfinite, (scaling.base, scaling.factor, scaling.amplification)))
        or scaling.base <= 0
        or scaling.factor <= 0
    ):
        raise LoadingError(
            f"its rope has base {scaling.base} and factor {scaling.factor}; the file is damaged"
        )
    return scaling


def _yarn(scaling: _Scaling) -> dict[str, Any]:
    if scaling.original is None:
        raise LoadingError("its rope is scaled by yarn, but it has no original_context_length")
    growth = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return {
        "rope_type": "yarn",
        "rope_theta": scaling.base,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original,
        "beta_fast": scaling.fast,
        "beta_slow": scaling.slow,
        "attention_factor": scaling.amplification * growth,
    }


def _by_common_factors(scaling: _Scaling, factors: Factors, context: int, rotated: int) -> dict[str, Any]:
    """Make rope parameters with the same factors for all lengths; those of Llama 3.x are recognised."""
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": scaling.base,
        "factor": float(factors.max()) * scaling.factor,
        **_LLAMA3,
    }
    if (
        scaling.factor == 1.0
        and factors.shape == (rotated // 2,)
        and np.allclose(factors, _llama3_factors(llama3, rotated))
    ):
        return llama3
    scaled = factors * scaling.factor
    return _by_factors(scaling.base, scaled, scaled, context, 1.0, rotated)


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
