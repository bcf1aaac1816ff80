"""Build what computes a loaded model: weights in the layout of the device, KV memory, and an engine."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from headrace.worker.engine.attention_kinds import AttentionKind, Layers
from headrace.worker.engine.cpu import packing
from headrace.worker.engine.cpu.decoder import Decoder, DecoderWeights
from headrace.worker.engine.forward import Forward, TransformersForward, scores_prompts
from headrace.worker.engine.gpu.cuda import is_out_of_memory
from headrace.worker.engine.interface import Engine, Grammars, ModelInfo, Result, Row
from headrace.worker.engine.load import gpu_assembly
from headrace.worker.engine.load.devices import Plan
from headrace.worker.engine.load.precision import Precision
from headrace.worker.engine.load.refusals import SEE_MODELS, LoadingError, UnsupportedModel, one_line
from headrace.worker.engine.load.self_check import CheckedEngine
from headrace.worker.engine.torch_engine import TorchEngine

log = logging.getLogger(__name__)

# Smaller steps are padded to this many tokens on the CPU if layers are not packed, because the plain matrix
# kernels round differently below: measured bitwise with torch 2.13, the shapes of the two default models, and
# up to 600 rows.
_MIN_PLAIN_TOKENS = {torch.float32: 4, torch.bfloat16: 2}
_M_ARENA_MAX = -8  # glibc's malloc.h


def ignore(_: object) -> None:
    """Do nothing with a report or a result."""


@contextlib.contextmanager
def as_unsupported(network: object, *, gpu: bool) -> Iterator[None]:
    """Convert an exception of a model's own code, which ragged batches can cause, to UnsupportedModel.

    network   the model
    gpu       whether it is computed on a GPU
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, LoadingError | MemoryError) or is_out_of_memory(error):
            raise
        log.debug("the code of the model failed", exc_info=True)
        name, reason = type(network).__name__, one_line(error)
        raise UnsupportedModel(
            f"{name} cannot be computed on a GPU: {reason}; use --device cpu, serve it with transformers or "
            f"vLLM, or choose another model: {SEE_MODELS}"
            if gpu
            else f"{name} does not support batches of sequences of different lengths as Headrace computes "
            f"them: {reason}; serve it with transformers or vLLM, or choose another model: {SEE_MODELS}"
        ) from error


class ModelEngine(Engine, CheckedEngine, Protocol):
    """An engine of a loaded model."""

    @property
    def verifies_drafts(self) -> bool:
        """Whether rows may have a `draft`; constant."""
        ...

    def step(self, rows: Sequence[Row]) -> list[Result]:
        """Compute a step, and wait for it; see `Engine.launch`."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """A loaded network, and the choices from which its engines are built.

    network   None once a decoder has its weights
    decoder   weights laid out for a `Decoder` or, on a GPU, for a `GpuDecoder`; None where the code of
              transformers computes
    packed    all linear layers are packed, so that smaller steps are batch-invariant; see `packing`
    """

    network: Any
    layers: Layers
    kind: AttentionKind
    precision: Precision
    plan: Plan
    decoder: Any = None
    packed: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """Optional features of its engines, see `ModelInfo`."""
        prompts = self.decoder is not None or scores_prompts(self.network)
        return ("logprobs", "top_logprobs", *(("prompt_logprobs",) if prompts else ()))

    def prepared(self, progress: Callable[[str], None]) -> LoadedModel:
        """Lay out the weights of the network for the kernels that read them.

        On a GPU, which may not hold two copies, they may change the network.
        """
        if self.plan.target.gpu:
            weights = gpu_assembly.prepare(self.network, self.layers, self.plan, progress)
            return self if weights is None else dataclasses.replace(self, network=None, decoder=weights)
        if self.precision.element_type is not None:
            progress("laying out weights")
            weights = DecoderWeights(self.network, self.precision.element_type, positions=self.plan.positions)
            return dataclasses.replace(self, decoder=weights)
        return dataclasses.replace(self, packed=packing.pack_linears(self.network))

    def without_network(self) -> LoadedModel:
        """Return the model without its network if a decoder has the weights."""
        return self if self.decoder is None else dataclasses.replace(self, network=None)

    def with_one_layer(self) -> LoadedModel:
        """Return the model with only the first layer of its decoder, if that one is for a CPU."""
        if not isinstance(self.decoder, DecoderWeights):
            return self
        first = next(iter(self.layers))
        return dataclasses.replace(
            self, layers={first: self.layers[first]}, decoder=self.decoder.first_layer()
        )

    def build_engine(
        self,
        model: ModelInfo,
        progress: Callable[[str], None] = ignore,
        *,
        graphs: bool = True,
        grammars: Grammars | None = None,
    ) -> ModelEngine:
        """Allocate KV memory for a model, and build the engine that computes over it.

        graphs     on a GPU, compute steps as CUDA graphs
        grammars   of the model's vocabulary; None to support none
        """
        if not self.plan.target.gpu:
            return TorchEngine(self.build_forward(model), model, grammars)
        return gpu_assembly.build_gpu_engine(
            model,
            self.plan,
            network=self.network,
            weights=self.decoder,
            layers=self.layers,
            kind=self.kind,
            dtype=self.precision.memory_dtype,
            progress=progress,
            graphs=graphs,
            grammars=grammars,
        )

    def build_forward(self, model: ModelInfo) -> Forward:
        """Allocate KV memory for a model, and build the `Forward` that computes over it on a CPU."""
        memory = self.kind.make_memory(self.layers, model.kv_blocks)
        if self.decoder is not None:
            return Decoder(self.decoder, memory, threads=torch.get_num_threads())
        assert self.kind.begin is not None
        return TransformersForward(
            self.network, functools.partial(self.kind.begin, memory), min_tokens=self._min_tokens()
        )

    def _min_tokens(self) -> int:
        min_tokens = packing.MIN_TOKENS if self.packed else _MIN_PLAIN_TOKENS
        return min_tokens.get(self.precision.network_dtype, 1)


def release_freed_memory() -> None:
    """Return freed memory to the system, because KV memory is sized by what the system has available."""
    gc.collect()  # modules have reference cycles
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def limit_malloc_arenas() -> None:
    """Let all threads allocate from the same arenas: each of glibc's keeps up to 64 MiB that was freed.

    Call it before threads allocate.
    """
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
