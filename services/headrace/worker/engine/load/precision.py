"""In which numbers a model is computed: what the setting `dtype` means for a device, a CPU and a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from headrace.worker.engine.cpu import decoder
from headrace.worker.engine.cpu.kernels.matmul import Kind
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel

NAMES = ("auto", "float32", "bfloat16", "float16", "int8")

_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KINDS = {"float32": Kind.FLOAT32, "bfloat16": Kind.BFLOAT16, "int8": Kind.INT8}


@dataclass(frozen=True, slots=True)
class Precision:
    """One answer to the question.

    name      as the setting calls it, and `ModelInfo.dtype`
    network   what transformers loads the weights in
    memory    what keys and values are kept in
    kind      what `decoder` multiplies in; None where transformers' own code computes
    """

    name: str
    network: torch.dtype
    memory: torch.dtype
    kind: Kind | None


def choose_precision(name: str, device: torch.device, architecture: str, config: Any) -> Precision:
    """Turn the setting into a precision. Raises LoadingError for one that is unknown or not to be had.

    architecture   the class that transformers would make of *config*

    "auto" is bfloat16 on CUDA. On CPUs it is int8 where `decoder` takes the model, else bfloat16 on CPUs
    that multiply it in hardware (avx512_bf16 or AMX), else float32, for there bfloat16 is slower.
    """
    if name not in NAMES:
        raise LoadingError(f"dtype {name!r} is not one of {', '.join(NAMES)}")
    if device.type == "cuda":
        if name == "int8":
            raise LoadingError("int8 is for CPUs; on CUDA use bfloat16, or auto")
        dtype = _TORCH.get(name, torch.bfloat16)
        return Precision(str(dtype).removeprefix("torch."), dtype, dtype, None)
    int8 = decoder.refusal(architecture, config, Kind.INT8)
    if name == "auto":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "int8" if not int8 else "bfloat16" if native else "float32"
    if name == "int8":
        if int8:
            raise UnsupportedModel(f"int8 is not to be had: {int8}; use bfloat16 or float32, or auto")
        # Rounded once, from all that the file has.
        return Precision(name, torch.float32, torch.bfloat16, Kind.INT8)
    dtype, kind = _TORCH[name], _KINDS.get(name)
    if kind is not None and decoder.refusal(architecture, config, kind):
        kind = None
    return Precision(name, dtype, dtype, kind)
