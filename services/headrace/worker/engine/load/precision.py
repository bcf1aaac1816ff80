"""Choose the number formats of a model: the meaning of the setting `dtype` on a device and for a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from headrace.worker.engine.cpu import decoder
from headrace.worker.engine.cpu.kernels.matmul import ElementType
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel

NAMES = ("auto", "float32", "bfloat16", "float16", "int8")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ELEMENT_TYPES = {
    "float32": ElementType.FLOAT32,
    "bfloat16": ElementType.BFLOAT16,
    "int8": ElementType.INT8,
}


@dataclass(frozen=True, slots=True)
class Precision:
    """The number formats of one model.

    name            as in the setting and in `ModelInfo.dtype`
    network_dtype   in which transformers loads the weights
    memory_dtype    of keys and values
    element_type    of the matrix products of a `Decoder`; None where the code of transformers computes
    """

    name: str
    network_dtype: torch.dtype
    memory_dtype: torch.dtype
    element_type: ElementType | None


def choose_precision(name: str, architecture: str, config: Any, *, gpu: bool) -> Precision:
    """Convert the setting to a precision. Raises LoadingError if it is unknown or not supported.

    architecture   class of the model in transformers for *config*
    gpu            whether the kernels of GPUs compute

    "auto" is bfloat16 on GPUs. On CPUs it is int8 where `decoder` supports the model, else bfloat16 on CPUs
    that multiply it in hardware (avx512_bf16 or AMX), else float32, because bfloat16 is slower there.
    """
    if name not in NAMES:
        raise LoadingError(f"dtype {name!r} is not one of {', '.join(NAMES)}")
    if gpu:
        if name == "int8":
            raise LoadingError("int8 is supported only on CPUs; on GPUs use bfloat16, or auto")
        dtype = _DTYPES.get(name, torch.bfloat16)
        return Precision(str(dtype).removeprefix("torch."), dtype, dtype, None)
    no_int8 = decoder.unsupported_reason(architecture, config, ElementType.INT8)
    if name == "auto":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "int8" if not no_int8 else "bfloat16" if native else "float32"
    if name == "int8":
        if no_int8:
            raise UnsupportedModel(f"int8 is not supported: {no_int8}; use bfloat16, float32 or auto")
        # Weights are loaded in float32, so that they are rounded only once.
        return Precision(name, torch.float32, torch.bfloat16, ElementType.INT8)
    dtype, element_type = _DTYPES[name], _ELEMENT_TYPES.get(name)
    if element_type is not None and decoder.unsupported_reason(architecture, config, element_type):
        element_type = None
    return Precision(name, dtype, dtype, element_type)


def decoder_precision(element_type: ElementType) -> Precision:
    """Return the precision of a model that a `Decoder` computes."""
    name = next(name for name, own in _ELEMENT_TYPES.items() if own is element_type)
    network = _DTYPES.get(name, torch.float32)
    memory = torch.float32 if element_type is ElementType.FLOAT32 else torch.bfloat16
    return Precision(name, network, memory, element_type)
