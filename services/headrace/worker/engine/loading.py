"""Make an engine from files: a model folder as transformers lays it out, or one .gguf file.

Everything that can be wrong with the files, the device or the model is found here, before the worker
says that it is ready. Downloading is somebody else's work; this module never reaches the network.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from headrace.models import file_digest
from headrace.worker.engine import cuda, kv_sizing, packing, selfcheck
from headrace.worker.engine.attention import IMPLEMENTATION, observe_layers, paged_attention
from headrace.worker.engine.attention_kinds import AttentionKind, Layers, choose_kind
from headrace.worker.engine.decoder import Decoder, DecoderWeights
from headrace.worker.engine.forward import Forward, TransformersForward, VarlenForward
from headrace.worker.engine.gguf_weights import END_OF_TURN, dequantised
from headrace.worker.engine.kernels.compiling import compile_kernels
from headrace.worker.engine.precision import Precision, choose_precision
from headrace.worker.engine.refusals import LoadingError, UnsupportedModel
from headrace.worker.engine.seam import ModelInfo
from headrace.worker.engine.static_decodes import StaticDecodes
from headrace.worker.engine.torch_engine import TorchEngine

log = logging.getLogger(__name__)

# Served by default even if the model could hold more.
DEFAULT_CONTEXT = 8192

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
    progress                hears short sentences about what takes time

    Raises LoadingError, or UnsupportedModel if this engine would not compute the model right.
    """
    place = choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    if place.type == "cpu":
        compile_kernels(progress)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder, digest = path, ""
    if path.suffix == ".gguf" and path.is_file():
        digest = file_digest(path)
        folder = dequantised(path, digest=digest, cache=cache, progress=progress)
    config = read_config(folder)
    architecture = str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)  # type: ignore[attr-defined]
    precision = choose_precision(dtype, place, architecture, config)
    progress(f"loading {name} in {precision.name}")
    network = _read_network(folder, precision.network, place)
    with _refusing(network):
        layers = observe_layers(network)
    kind = choose_kind(layers, place, precision.memory)
    if kind.reason:
        progress(f"attention in plain torch, which is slow: {kind.reason}")
    context = choose_context(config, context_length)
    model = ModelInfo(
        name=name,
        revision=digest or (path.name if path.parent.name == "snapshots" else ""),
        dtype=precision.name,
        device=str(place),
        tokenizer_fingerprint=tokenizer_fingerprint,
        weights_fingerprint=weights_fingerprint(folder, digest, precision.name),
        context_length=context,
        vocabulary_size=network.get_output_embeddings().weight.shape[0],
        eos_ids=read_eos_ids(folder, network),
        max_running=max_running,
        block_tokens=kind.block_tokens,
        kv_blocks=max_running * -(-context // kind.block_tokens),
        exact=False,
        features=("logprobs",),
    )
    parts = _Parts(network, layers, kind, precision, _lay_out(network, precision, context, progress))
    progress("comparing with transformers' own forward pass")
    exact = _check(parts, model)
    if isinstance(parts.weights, DecoderWeights):
        del network
        parts = dataclasses.replace(parts, network=None)
        _give_back()
    progress("measuring the memory of a step")
    blocks = _size_memory(parts, model, step_tokens=step_tokens, asked=kv_memory)
    model = dataclasses.replace(model, exact=exact, kv_blocks=blocks)
    progress(f"KV memory for {model.kv_tokens} tokens, {blocks * kind.block_bytes(layers) / 2**30:.1f} GiB")
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
    network: Any, precision: Precision, context: int, progress: Callable[[str], None]
) -> DecoderWeights | bool:
    """Lay the weights of a network on the CPU out for the kernels that will read them; see `_Parts`."""
    if precision.kind is not None:
        progress("laying out weights")
        return DecoderWeights(network, precision.kind, positions=context)
    return network.device.type == "cpu" and packing.pack_linears(network)


@contextlib.contextmanager
def _refusing(network: Any) -> Iterator[None]:
    """Turn what goes wrong in a model's own code, called as it does not expect, into a refusal."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"{type(network).__name__} cannot be computed in ragged steps: {error}"
        ) from error


def _check(parts: _Parts, model: ModelInfo) -> bool:
    """Refuse what would be computed wrong, and say whether the engine is exact."""
    probe = dataclasses.replace(
        model,
        max_running=selfcheck.SEQUENCES,
        context_length=selfcheck.CONTEXT,
        kv_blocks=selfcheck.blocks_needed(model.block_tokens),
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


def choose_context(config: Any, asked: int | None) -> int:
    """Decide how many tokens a sequence may have. Raises LoadingError when too many are asked for."""
    text = config.get_text_config()
    limit = int(getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT)
    for rope in _ropes(getattr(text, "rope_parameters", None) or {}):
        # These scale with the longest sequence in the step: beyond the original length, a row would depend
        # on its neighbours, and keys held in memory would be stale.
        if rope["rope_type"] in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(text, "original_max_position_embeddings", None) or limit
            limit = min(limit, int(original))
    if limit < selfcheck.SHORTEST:
        raise UnsupportedModel(f"the model holds {limit} tokens; at least {selfcheck.SHORTEST} are needed")
    if asked is None:
        return min(limit, DEFAULT_CONTEXT)
    if not 0 < asked <= limit:
        raise LoadingError(f"context length {asked} is not between 1 and {limit}, which the model can hold")
    return asked


def _ropes(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rope parameters as a list: some models have one set, some have one per kind of layer."""
    if "rope_type" in parameters:
        return [parameters]
    return [own for own in parameters.values() if isinstance(own, dict) and "rope_type" in own]


def read_config(folder: Path) -> Any:
    """Read config.json, and refuse what is not a causal language model that transformers knows."""
    try:
        plain = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise LoadingError(
            f"no model at {folder}: expected a folder with config.json, or a .gguf file"
        ) from error
    except ValueError as error:
        raise LoadingError(f"{folder / 'config.json'} is not JSON: {error}") from error
    kind = plain.get("model_type")
    if kind not in CONFIG_MAPPING:
        if "auto_map" in plain:
            raise UnsupportedModel(
                f"{folder} brings code of its own (auto_map), which is not run here; "
                f"convert it to an architecture that transformers has"
            )
        raise UnsupportedModel(f"{folder} has model_type {kind!r}, which this transformers does not know")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{folder} is an encoder-decoder model ({kind}); only decoders are served")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(
            f"{folder} has no head to generate with: {kind} is not a causal language model"
        )
    return config


def _read_network(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise LoadingError(f"cannot load the weights in {folder}: {error}") from error
    network, found = loaded
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise LoadingError(f"{folder} lacks {len(missing)} weights, the first of them {missing[0]}")
    try:
        network.set_attn_implementation(IMPLEMENTATION)
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"{type(network).__name__} does not take attention functions: {error}"
        ) from error
    return network.to(device).eval()


def read_eos_ids(folder: Path, network: Any) -> frozenset[int]:
    """Collect the ids that end a turn.

    What the generation config and the config name, the tokenizer's eos token, and special tokens that
    are known to end turns: many folders name only the one that ends a document. Ids beyond the vocabulary
    are left out, and logged: the model never draws them.
    """
    ids: set[int] = set()
    for source in (network.generation_config, network.config.get_text_config()):
        named = getattr(source, "eos_token_id", None)
        ids.update([named] if isinstance(named, int) else named or ())
    vocabulary = network.config.get_text_config().vocab_size
    settings = _read_json(folder / "tokenizer_config.json")
    eos = settings.get("eos_token")
    ends = END_OF_TURN | {eos["content"] if isinstance(eos, dict) else eos}
    added = {int(index): token for index, token in settings.get("added_tokens_decoder", {}).items()}
    added |= {token["id"]: token for token in _read_json(folder / "tokenizer.json").get("added_tokens", [])}
    ids.update(index for index, token in added.items() if token.get("special") and token["content"] in ends)
    unknown = {id for id in ids if not (isinstance(id, int) and 0 <= id < vocabulary)}
    if unknown:
        log.warning(
            "ids that end a turn are not in the vocabulary",
            extra={"ids": str(unknown), "vocabulary": vocabulary},
        )
    return frozenset(ids - unknown)


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def weights_fingerprint(folder: Path, digest: str, dtype: str) -> str:
    """Return 16 hex digits, equal for equal weights computed in the same dtype.

    From the file's digest for a gguf. For a folder from config.json and, of each safetensors file, the
    size, the header and the last kilobyte: reading all weights would take as long as loading them.
    """
    state = hashlib.sha256(f"{dtype} {digest}".encode())
    if not digest:
        state.update((folder / "config.json").read_bytes())
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            with path.open("rb") as file:
                size = path.stat().st_size
                header = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 1024
                state.update(f"{path.name} {size}".encode() + file.read(min(header, size)))
                file.seek(max(size - 1024, 0))
                state.update(file.read())
    return state.hexdigest()[:16]
