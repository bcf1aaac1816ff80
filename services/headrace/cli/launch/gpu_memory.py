"""Divide the memory of a GPU between the tiers whose workers share it.

Each worker would otherwise take nine tenths of what is free when it has loaded its model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# The part of the memory that is divided by the size of the weights. The rest is divided equally: steps, keys
# and values of a small model need memory too.
_BY_WEIGHTS = 0.75


def memory_shares(weights: Mapping[str, int]) -> dict[str, str]:
    """Return the share of the memory for each tier, such as "0.85"; together at most 1.

    weights   bytes of the weights of each tier
    """
    whole = sum(weights.values())
    equal = 1 / len(weights)
    shares = {}
    for name, size in weights.items():
        by_weights = size / whole if whole else equal
        share = _BY_WEIGHTS * by_weights + (1 - _BY_WEIGHTS) * equal
        shares[name] = f"{int(share * 1000) / 1000:.3f}"  # rounded down
    return shares


def weight_bytes(model: Path) -> int:
    """Return the bytes of the weights of a model: a folder or a .gguf file."""
    if model.is_file():
        return model.stat().st_size
    files = [*model.glob("*.safetensors")] or [*model.glob("*.bin")]
    return sum(file.stat().st_size for file in files)
