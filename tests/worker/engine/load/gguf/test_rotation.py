"""Scaled rope is read from gguf files as llama.cpp defines it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tests.worker.engine.load.gguf.gguf_files import (
    SIZES,
    Tensors,
    llama,
    network_of,
    off,
    unpacked,
    write_gguf,
)

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors(width: int = 16) -> Any:
    """The factors by which llama.cpp's converter divides the frequencies of Llama 3.1."""
    factors = []
    for index in range(0, width, 2):
        wavelength = 2 * np.pi * LLAMA3["rope_theta"] ** (index / width)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(factors, np.float32)


ROTATIONS: dict[str, tuple[dict[str, Any], Mapping[str, Any], Any]] = {
    "llama3": (LLAMA3, {}, llama3_factors()),
    "factors of its own": (
        {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "factor": 1.0,
            "attention_factor": 1.0,
            "short_factor": [1.0, 1.0, 1.5, 2.0, 3.0, 5.0, 5.0, 7.0],
            "long_factor": [1.0, 1.0, 1.5, 2.0, 3.0, 5.0, 5.0, 7.0],
            "original_max_position_embeddings": 512,
        },
        {},
        np.array([1.0, 1.0, 1.5, 2.0, 3.0, 5.0, 5.0, 7.0], np.float32),
    ),
    "linear": (
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        None,
    ),
    "linear, in the old way": (
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
        None,
    ),
    "none": (
        {"rope_type": "default", "rope_theta": 10_000.0},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        None,
    ),
    "yarn": (
        {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
            "llama.rope.scaling.finetuned": True,
        },
        None,
    ),
    "yarn, with numbers of its own": (
        {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 0.5 * (0.1 * np.log(4.0).item() + 1),
        },
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
            "llama.rope.scaling.attn_factor": 0.5,
            "llama.rope.scaling.yarn_beta_fast": 16.0,
            "llama.rope.scaling.yarn_beta_slow": 2.0,
        },
        None,
    ),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rope_scaling_is_read(name: str, tmp_path: Path) -> None:
    """Without it, answers degrade with distance, which no short check detects."""
    rope, keys, factors = ROTATIONS[name]
    network = llama(rope_parameters=rope)

    def scale(tensors: Tensors) -> None:
        if factors is not None:
            tensors["rope_freqs.weight"] = factors

    path = write_gguf(
        tmp_path / "model.gguf",
        network,
        "llama",
        keys={"llama.rope.freq_base": rope["rope_theta"], **keys},
        change=scale,
    )

    read = unpacked(path, tmp_path)

    assert off(read, network) < 1e-5
    if rope["rope_type"] != "default":
        assert off(read, llama()) > 1e-3, "the scaling affects this test"


def test_the_short_and_long_factors_of_longrope_are_read(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [2.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        "original_max_position_embeddings": 256,
        "attention_factor": 1.19,
        "partial_rotary_factor": 1.0,
    }
    config = transformers.Phi3Config(**SIZES, original_max_position_embeddings=256, rope_parameters=rope)
    network = network_of(config)

    def scale(tensors: Tensors) -> None:
        for kind in ("short", "long"):
            tensors[f"rope_factors_{kind}.weight"] = np.array(rope[f"{kind}_factor"], np.float32)

    path = write_gguf(
        tmp_path / "model.gguf",
        network,
        "phi3",
        keys={"phi3.rope.scaling.attn_factor": 1.19, "phi3.rope.scaling.original_context_length": 256},
        change=scale,
    )

    assert off(unpacked(path, tmp_path), network) < 1e-5
