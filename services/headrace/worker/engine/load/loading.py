"""Make an engine from files: a model folder as transformers lays it out, or one .gguf file.

Everything that can be wrong with the files, the device or the model is found before the worker is ready, and
refused in one line (`refusals`). `model_config` reads config.json, `model_files` opens each file, `network`
has transformers load the weights, `gguf_weights` unpacks gguf files, `selfcheck` compares the engine with
transformers. Downloading is done elsewhere; this module never reaches the network.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from headrace.models import file_digest
from headrace.worker.engine.attention_kinds import AttentionKind, Layers, choose_kind
from headrace.worker.engine.cpu import packing
from headrace.worker.engine.cpu.decoder import Decoder, DecoderWeights
from headrace.worker.engine.cpu.kernels.compiling import compile_kernels
from headrace.worker.engine.forward import Forward, TransformersForward, VarlenForward
from headrace.worker.engine.gpu import cuda
from headrace.worker.engine.gpu.static_decodes import StaticDecodes
from headrace.worker.engine.interface import ModelInfo
from headrace.worker.engine.load import kv_sizing
from headrace.worker.engine.load import self_check as selfcheck
from headrace.worker.engine.load.gguf.weights import dequantised
from headrace.worker.engine.load.identity import read_eos_ids, weights_fingerprint
from headrace.worker.engine.load.model_config import (
    DEFAULT_CONTEXT,
    choose_context,
    longest_context,
    read_config,
)
from headrace.worker.engine.load.model_files import brief, explained
from headrace.worker.engine.load.network import read_network
from headrace.worker.engine.load.precision import Precision, choose_precision
from headrace.worker.engine.load.refusals import INSTEAD, LoadingError, UnsupportedModel
from headrace.worker.engine.torch_engine import TorchEngine
from headrace.worker.engine.transformers_attention import IMPLEMENTATION, observe_layers, paged_attention

__all__ = ["DEFAULT_CONTEXT", "choose_device", "load_engine"]

log = logging.getLogger(__name__)

# Steps of fewer tokens are padded on the CPU where layers are not packed, since its plain matrix kernels
# round differently below: measured bitwise with torch 2.13, the two default models' shapes, up to 600 rows.
_MIN_TOKENS = {torch.float32: 4, torch.bfloat16: 2}


def _quiet(_: str) -> None:
    pass


def load_engine(
    path: Path,
    *,
    name: str,
    cache: Path,
    tokenizer_fingerprint: str,
    device: str = "cpu",
    dtype: str = "auto",
    threads: int | None = None,
    context_length: int | None = None,
    max_running: int = 32,
    step_tokens: int = 512,
    kv_memory: float | None = None,
    progress: Callable[[str], None] = _quiet,
    warn: Callable[[str], None] = _quiet,
) -> TorchEngine:
    """Load a model, check it and warm it up.

    path                    a folder with config.json and safetensors, or a .gguf file
    name                    what the model is called in the mesh
    cache                   a folder for what is made once, such as unpacked gguf weights
    tokenizer_fingerprint   handed through to `ModelInfo`
    device                  "cpu", "cuda" or "cuda:N"
    dtype                   one of `precision.NAMES`; see `choose_precision`
    threads                 for torch on the CPU; None leaves torch's choice
    context_length          tokens of prompt and answer; None for what the model can hold, at most
                            DEFAULT_CONTEXT
    max_running             sequences at the same time
    step_tokens             most tokens that one step will compute; KV memory leaves room for such a step
    kv_memory               GiB of KV memory; None for a share of what is free, see `kv_sizing`
    progress                is given short sentences about what takes time
    warn                    is given sentences about what a user should know, though the model is served

    Raises LoadingError, or UnsupportedModel if this engine would not compute the model right. The messages
    are one line each; the traceback of an unexpected error goes to the log at level DEBUG.
    """
    with explained(f"cannot load {path}", f"{INSTEAD}; --log-level DEBUG shows where it failed"):
        place = choose_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        AttentionInterface.register(IMPLEMENTATION, paged_attention)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        folder, digest = path, ""
        if path.suffix == ".gguf" and path.is_file():
            digest = file_digest(path)
            folder = dequantised(path, digest=digest, cache=cache, progress=progress)
        config = read_config(folder)
        architecture = str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)  # type: ignore[attr-defined]
        context = choose_context(config, context_length)
        precision = choose_precision(dtype, place, architecture, config)
        progress(f"loading {name} in {precision.name}")
        network = read_network(folder, precision.network, place, warn)
        with _refusing(network):
            layers = observe_layers(network)
        if place.type == "cpu":
            compile_kernels(progress)
        kind = choose_kind(layers, place, precision.memory)
        if kind.reason:
            progress(f"attention in plain torch, which is slow: {kind.reason}")
        # The check runs over sequences of some length, however short those are that will be served.
        checked = min(selfcheck.CONTEXT, longest_context(config))
        vocabulary = int(network.get_output_embeddings().weight.shape[0])
        model = ModelInfo(
            name=name,
            revision=digest or (path.name if path.parent.name == "snapshots" else ""),
            dtype=precision.name,
            device=str(place),
            tokenizer_fingerprint=tokenizer_fingerprint,
            weights_fingerprint=weights_fingerprint(folder, digest, precision.name),
            context_length=context,
            vocabulary_size=vocabulary,
            eos_ids=read_eos_ids(folder, network, vocabulary=vocabulary, warn=warn),
            max_running=max_running,
            block_tokens=kind.block_tokens,
            kv_blocks=max_running * -(-context // kind.block_tokens),
            exact=False,
            features=("logprobs",),
        )
        parts = _Parts(
            network, layers, kind, precision, _lay_out(network, precision, max(context, checked), progress)
        )
        progress("comparing with transformers' own forward pass")
        exact = _check(parts, model, checked)
        if isinstance(parts.weights, DecoderWeights):
            del network
            parts = dataclasses.replace(parts, network=None)
            _give_back()
        progress("measuring the memory of a step")
        blocks = _size_memory(parts, model, step_tokens=step_tokens, asked=kv_memory)
        model = dataclasses.replace(model, exact=exact, kv_blocks=blocks)
        progress(
            f"KV memory for {model.kv_tokens} tokens, {blocks * kind.block_bytes(layers) / 2**30:.1f} GiB"
        )
        return TorchEngine(parts.assemble(model, progress), model)


@dataclasses.dataclass(frozen=True, slots=True)
class _Parts:
    """What engines of one loaded network are made of.

    network   None once a decoder has what it needs of it
    weights   laid out for a decoder; or whether all linear layers of the network are packed, and rows come
              out the same in steps of fewer tokens
    """

    network: Any
    layers: Layers
    kind: AttentionKind
    precision: Precision
    weights: DecoderWeights | bool

    def assemble(
        self, model: ModelInfo, progress: Callable[[str], None] = _quiet, *, graphs: bool = True
    ) -> Forward:
        """Make KV memory as the model tells, and what computes over it."""
        network, kind = self.network, self.kind
        place = torch.device(model.device)
        if isinstance(self.weights, DecoderWeights):
            memory = kind.make_memory(self.layers, model.kv_blocks)
            return Decoder(self.weights, memory, threads=torch.get_num_threads())
        if kind.name != "flash":
            memory = kind.make_memory(self.layers, model.kv_blocks)
            fewest = packing.MIN_TOKENS if self.weights else _MIN_TOKENS
            return TransformersForward(
                network,
                functools.partial(kind.begin, memory),
                min_tokens=fewest.get(self.precision.network, 1) if place.type == "cpu" else 1,
            )
        memory = kind.make_memory(self.layers, model.kv_blocks + 1)  # one for padding
        if not graphs:
            return VarlenForward(network, memory)
        progress("capturing CUDA graphs")
        try:
            decodes = StaticDecodes(
                network,
                memory,
                max_rows=model.max_running,
                context_length=model.context_length,
                vocabulary=model.vocabulary_size,
                capture=cuda.GraphPool(place).capture,
            )
        except RuntimeError as error:
            progress(f"{type(network).__name__} computes without CUDA graphs, which is slower: {error}")
            return VarlenForward(network, memory)
        return VarlenForward(network, memory, decodes)


def _give_back() -> None:
    """Return what was freed to the system, which sizes KV memory by what it has."""
    gc.collect()  # modules refer to each other in circles
    with contextlib.suppress(AttributeError, OSError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)


def _lay_out(
    network: Any, precision: Precision, positions: int, progress: Callable[[str], None]
) -> DecoderWeights | bool:
    """Lay the weights of a network on the CPU out for the kernels that will read them; see `_Parts`.

    positions   tokens of the longest sequence that is served or checked
    """
    if precision.kind is not None:
        progress("laying out weights")
        return DecoderWeights(network, precision.kind, positions=positions)
    return network.device.type == "cpu" and packing.pack_linears(network)


@contextlib.contextmanager
def _refusing(network: Any) -> Iterator[None]:
    """Turn what goes wrong in a model's own code, called as it does not expect, into a refusal."""
    try:
        yield
    except (LoadingError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        log.debug("a model's own code failed", exc_info=True)
        raise UnsupportedModel(
            f"{type(network).__name__} does not run on batches of sequences of different lengths, as "
            "Headrace "
            f"computes them: {brief(error)}; serve it with transformers or vLLM, or another model here: "
            f"{INSTEAD}"
        ) from error


def _check(parts: _Parts, model: ModelInfo, context: int) -> bool:
    """Refuse what would be computed wrong, and return whether the engine is exact.

    context   tokens of the longest sequence to try
    """
    probe = dataclasses.replace(
        model,
        max_running=selfcheck.SEQUENCES,
        context_length=context,
        kv_blocks=selfcheck.blocks_needed(model.block_tokens, context),
    )
    place, memory = torch.device(model.device), parts.precision.memory
    with _refusing(parts.network):
        exact = selfcheck.check(TorchEngine(parts.assemble(probe), probe), parts.network)
        return selfcheck.check_attention(parts.kind, parts.layers, place, memory) and exact


def _size_memory(parts: _Parts, model: ModelInfo, *, step_tokens: int, asked: float | None) -> int:
    """Run the largest step there may be, and return how many blocks fit beside it."""
    place = torch.device(model.device)
    # Its rows live in two blocks, so it needs no more; see `kv_sizing.largest_step`.
    two = dataclasses.replace(model, kv_blocks=2, context_length=2 * model.block_tokens)
    engine = TorchEngine(parts.assemble(two, graphs=False), two)
    rows = kv_sizing.largest_step(
        step_tokens=step_tokens,
        max_running=model.max_running,
        context_length=model.context_length,
        block_tokens=model.block_tokens,
    )
    peak = kv_sizing.peak_bytes(place, lambda: _ignore(engine.step(rows)))
    sequence = -(-model.context_length // model.block_tokens)
    return kv_sizing.choose_blocks(
        free=kv_sizing.free_bytes(place),
        # Graphs keep a pool of their own, which takes no more than the step of most rows.
        peak=2 * peak if place.type == "cuda" else peak,
        share=kv_sizing.SHARES[place.type],
        block=parts.kind.block_bytes(parts.layers),
        fewest=sequence,
        most=sequence * model.max_running,
        asked=None if asked is None else int(asked * 2**30),
    )


def _ignore(_: object) -> None:
    pass


def choose_device(device: str) -> torch.device:
    """Turn the setting into a device that is there. Raises LoadingError."""
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda"):
        raise LoadingError(f"device {device!r} is not one of cpu, cuda, cuda:N")
    if place.type == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (place.index or 0) >= found:
        raise LoadingError(
            f"device {device!r} was asked for, but torch {torch.__version__} finds {found} CUDA devices; "
            f"use cpu, or a torch built for CUDA on a machine with a driver"
        )
    return torch.device("cuda", place.index or 0)
