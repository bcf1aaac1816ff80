"""Build what computes a loaded model: weights in the layout of the device, KV memory, and a `Forward`."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
from collections.abc import Callable
from typing import Any

import torch

from headrace.worker.engine.attention_kinds import AttentionKind, Layers
from headrace.worker.engine.cpu import packing
from headrace.worker.engine.cpu.decoder import Decoder, DecoderWeights
from headrace.worker.engine.forward import Forward, TransformersForward
from headrace.worker.engine.gpu.varlen_forward import VarlenForward, with_cuda_graphs
from headrace.worker.engine.interface import ModelInfo
from headrace.worker.engine.load.precision import Precision

# Smaller steps are padded to this many tokens on the CPU if layers are not packed, because the plain matrix
# kernels round differently below: measured bitwise with torch 2.13, the shapes of the two default models, and
# up to 600 rows.
_MIN_PLAIN_TOKENS = {torch.float32: 4, torch.bfloat16: 2}


def ignore(_: object) -> None:
    """Do nothing with a report or a result."""


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """A loaded network, and the choices from which its engines are built.

    network   None once the weights are copied to a decoder
    decoder   weights laid out for a `Decoder`; None where the code of transformers computes
    packed    all linear layers are packed, so that smaller steps are batch-invariant; see `packing`
    """

    network: Any
    layers: Layers
    kind: AttentionKind
    precision: Precision
    decoder: DecoderWeights | None
    packed: bool

    @classmethod
    def prepare(
        cls,
        network: Any,
        layers: Layers,
        kind: AttentionKind,
        precision: Precision,
        *,
        positions: int,
        progress: Callable[[str], None],
    ) -> LoadedModel:
        """Lay out the weights of a network for the kernels that read them.

        positions   tokens of the longest sequence that is served or checked
        """
        decoder, packed = None, False
        if precision.element_type is not None:
            progress("laying out weights")
            decoder = DecoderWeights(network, precision.element_type, positions=positions)
        elif network.device.type == "cpu":
            packed = packing.pack_linears(network)
        return cls(network, layers, kind, precision, decoder, packed)

    def without_network(self) -> LoadedModel:
        """Return the model without its network, which a decoder does not need any more."""
        return dataclasses.replace(self, network=None)

    def with_one_layer(self) -> LoadedModel:
        """Return the model without the layers of its decoder after the first; itself if it has no decoder."""
        if self.decoder is None:
            return self
        first = next(iter(self.layers))
        return dataclasses.replace(
            self, layers={first: self.layers[first]}, decoder=self.decoder.first_layer()
        )

    def build_forward(
        self, model: ModelInfo, progress: Callable[[str], None] = ignore, *, graphs: bool = True
    ) -> Forward:
        """Allocate KV memory for a model, and build the `Forward` that computes over it.

        graphs   on CUDA, compute steps of decodes as CUDA graphs
        """
        if self.decoder is not None:
            memory = self.kind.make_memory(self.layers, model.kv_blocks)
            return Decoder(self.decoder, memory, threads=torch.get_num_threads())
        if self.kind.name == "flash":
            memory = self.kind.make_memory(self.layers, model.kv_blocks + 1)  # one block for padding
            if not graphs:
                return VarlenForward(self.network, memory)
            return with_cuda_graphs(self.network, memory, model, progress)
        memory = self.kind.make_memory(self.layers, model.kv_blocks)
        return TransformersForward(
            self.network, functools.partial(self.kind.begin, memory), min_tokens=self._min_tokens(model)
        )

    def _min_tokens(self, model: ModelInfo) -> int:
        if torch.device(model.device).type != "cpu":
            return 1
        min_tokens = packing.MIN_TOKENS if self.packed else _MIN_PLAIN_TOKENS
        return min_tokens.get(self.precision.network_dtype, 1)


def release_freed_memory() -> None:
    """Return freed memory to the system, because KV memory is sized by what the system has available."""
    gc.collect()  # modules have reference cycles
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
