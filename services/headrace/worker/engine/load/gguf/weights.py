"""Unpack a gguf file once, into a folder that transformers loads in a second.

transformers reads gguf files itself, but takes a quarter to half a minute each time. The unpacked copy
is an ordinary model folder in float32, four to eight times as large as the file; it lies in a cache and
can be deleted at any time.

The configuration comes from `gguf_config`, not from transformers. transformers reads the tensors alone, and
each of them is accounted for: a file that lacks one that the model needs, or holds one that is not read, is
refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.utils.quantization_config import GgufConfig

from headrace.worker.engine.load.gguf.config import config_from
from headrace.worker.engine.load.gguf.metadata import Metadata
from headrace.worker.engine.load.model_files import beginning, brief, explained
from headrace.worker.engine.load.network import account, quiet_transformers
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel

_FORMAT = "2"  # part of the folder's name: a change of what we write leaves old copies alone
_MANIFEST = "manifest.json"

# Texts by which models end a turn, as llama.cpp lists them (llama-vocab.cpp, special_eog_ids).
END_OF_TURN = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
    }
)
_CONTROL = 3  # gguf's token type of special tokens
_ROTATION = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


def dequantised(path: Path, *, digest: str, cache: Path, progress: Callable[[str], None]) -> Path:
    """Return a model folder that holds the file's weights in float32, made now or at an earlier start.

    path     a .gguf file
    digest   its sha256, which names the folder
    cache    a folder for such copies, made where it is missing

    The folder appears whole or not at all; processes that want the same one wait for the first. Raises
    UnsupportedModel for an architecture that transformers cannot read, LoadingError when the file is
    damaged or the cache cannot be written.
    """
    folder = cache / "dequantised" / f"{digest[:32]}-{_FORMAT}"
    if _whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if _whole(folder):
                return folder
            progress(f"unpacking {path.name}: once, for about half a minute")
            shutil.rmtree(folder, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as made:
                _unpack(path, Path(made))
                os.replace(made, folder)
                Path(made).mkdir()  # what the context manager will remove
    except OSError as error:
        raise LoadingError(
            f"cannot unpack {path} into {folder.parent}: {error}; make room there, or name another folder by "
            "--cache"
        ) from error
    return folder


def _unpack(path: Path, folder: Path) -> None:
    reader = _open(path)
    metadata = _metadata(reader)
    try:
        config = config_from(metadata)
        _require_all(metadata, config)
    except LoadingError as error:
        raise type(error)(f"{path} cannot be served: {error}") from error
    auto: Any = AutoModelForCausalLM
    with quiet_transformers(), explained(f"transformers cannot read {path}", "download it again"):
        network, found = auto.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            trust_remote_code=False,
        )
    account(path, found, lambda _: None)
    # From here on it is a plain model, but transformers remembers, and refuses to save quantised ones.
    network.config.__dict__.pop("quantization_config", None)
    network.hf_quantizer = None
    network.is_quantized = False
    network.generation_config.eos_token_id = sorted(_eos_ids(path, metadata)) or None
    network.save_pretrained(folder)
    seal(folder)


def _open(path: Path) -> GGUFReader:
    """Read a file's header. Raises LoadingError for one that is damaged."""
    if (begin := beginning(path, 4)) != b"GGUF":
        raise LoadingError(
            f"cannot read {path}: it begins with {begin!r}, where a gguf file has b'GGUF'; download it again"
        )
    try:
        reader = GGUFReader(path)
        if not reader.fields or "general.architecture" not in reader.fields:
            raise ValueError("its header names no architecture")
    except Exception as error:
        # numpy says that an index is out of bounds, or that an array cannot be reshaped.
        raise LoadingError(
            f"cannot read {path}: its header is damaged, or the file is cut off ({path.stat().st_size} "
            f"bytes): {brief(error)}; download it again"
        ) from error
    return reader


def _metadata(reader: GGUFReader) -> Metadata:
    """Take what a header says, and the factors of rotation, which are few."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return Metadata(
        {name: field.contents() for name, field in reader.fields.items()},
        {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()},
        {
            name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(-1)
            for name, tensor in tensors.items()
            if name in _ROTATION
        },
    )


def _require_all(metadata: Metadata, config: Any) -> None:
    """Refuse a file whose tensors are not just those of the model: by their names, before any is read."""
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        network = auto.from_config(config, trust_remote_code=False)
    kind: Any = TENSOR_PROCESSORS.get(metadata.architecture, TensorProcessor)
    processor = kind()
    needed = {_whole_name(name) for name in get_gguf_hf_weights_map(network, processor)}
    if config.tie_word_embeddings:
        needed.discard("output.weight")
    held = {_whole_name(name) for name in metadata.tensors} - _ROTATION
    missing, unknown = sorted(needed - held), sorted(held - needed)
    if missing:
        raise LoadingError(
            f"it lacks {len(missing)} of the model's {len(needed)} tensors, the first of them {missing[0]}; "
            f"it is incomplete, or one part of several (join those with `llama-gguf-split --merge`)"
        )
    if unknown:
        raise UnsupportedModel(
            f"it holds {len(unknown)} tensors that are not read, the first of them {unknown[0]}; without "
            "them "
            f"the model would answer wrongly. Use the model's original folder (config.json and safetensors)"
        )


def _whole_name(name: str) -> str:
    """Return a tensor's name in the file; transformers leaves the ending of experts' names out."""
    return name if name.endswith((".weight", ".bias")) else f"{name}.weight"


def seal(folder: Path) -> None:
    """Write down every file's size and bring all to the disk: from here on the folder counts as whole."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / _MANIFEST).write_text(json.dumps({"sizes": sizes}, indent=1))
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _eos_ids(path: Path, metadata: Metadata) -> set[int]:
    """Return the ids that end a turn: those that the file names, and the special tokens known to mean it."""
    values = metadata.values
    texts, kinds = (values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if not texts:
        raise LoadingError(f"{path} has no tokenizer (tokenizer.ggml.tokens); use a file that brings its own")
    ids = {values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    ids.update(
        index
        for index, (text, kind) in enumerate(zip(texts, kinds or (), strict=False))
        if kind == _CONTROL and text in END_OF_TURN
    )
    vocabulary = metadata.tensors["token_embd.weight"][0]
    return {index for index in ids if isinstance(index, int) and 0 <= index < vocabulary}


def _whole(folder: Path) -> bool:
    """Say whether the folder is there with every file at its size."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file closes, or the process dies
        yield
