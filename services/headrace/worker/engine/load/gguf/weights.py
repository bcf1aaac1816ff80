"""Unpack a gguf file once, to a folder that transformers loads in a second.

transformers can read gguf files directly, but takes 15 to 30 seconds each time. The unpacked copy is an
ordinary model folder in float32, four to eight times as large as the file. It is in the cache and can be
deleted at any time.

`config` provides the configuration; transformers reads only the tensors. Each tensor is accounted for: a file
that lacks a tensor of the model, or has an unknown one, is rejected.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
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
from headrace.worker.engine.load.identity import END_OF_TURN
from headrace.worker.engine.load.model_files import first_bytes
from headrace.worker.engine.load.network import account_for_weights, quiet_transformers
from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel, as_loading_error, one_line

_FORMAT = "2"  # part of the folder's name: a new format does not reuse old copies
_MANIFEST = "manifest.json"
_CONTROL = 3  # gguf's token type for special tokens
_ROPE_FACTORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


def dequantised(path: Path, *, digest: str, cache: Path, progress: Callable[[str], None]) -> Path:
    """Return a model folder with the file's weights in float32, unpacked now or at an earlier start.

    path     a .gguf file
    digest   its sha256, which is part of the folder's name
    cache    a folder for such copies; created if missing

    The folder is created atomically; other processes that need it wait for the first one. Raises
    UnsupportedModel if the architecture is not supported, LoadingError if the file is damaged or the cache
    cannot be written.
    """
    folder = cache / "dequantised" / f"{digest[:32]}-{_FORMAT}"
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if _is_complete(folder):
                return folder
            progress(f"unpacking {path.name}: only once, takes about half a minute")
            shutil.rmtree(folder, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as made:
                _unpack(path, Path(made))
                os.replace(made, folder)
                Path(made).mkdir()  # for the context manager to remove
    except OSError as error:
        raise LoadingError(
            f"cannot unpack {path} to {folder.parent}: {error}; free space there, or choose another folder "
            "with --cache"
        ) from error
    return folder


def _unpack(path: Path, folder: Path) -> None:
    reader = _open(path)
    metadata = _metadata(reader)
    try:
        config = config_from(metadata)
        with _reused(reader):
            _require_all(metadata, config)
    except LoadingError as error:
        raise type(error)(f"{path} cannot be served: {error}") from error
    auto: Any = AutoModelForCausalLM
    with (
        quiet_transformers(),
        as_loading_error(f"transformers cannot read {path}", "download it again"),
        _reused(reader),
    ):
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
    found["mismatched_keys"] = {*(found.get("mismatched_keys") or ()), *_misshapen(network)}
    account_for_weights(path, found, lambda _: None)
    # The model is a plain one now. transformers does not save quantised models, so its marks are removed.
    network.config.__dict__.pop("quantization_config", None)
    network.hf_quantizer = None
    network.is_quantized = False
    network.generation_config.eos_token_id = sorted(_eos_ids(path, metadata)) or None
    network.save_pretrained(folder)
    seal(folder)


def _misshapen(network: Any) -> Iterator[tuple[str, torch.Size, torch.Size]]:
    """Yield the weights whose shape is not the one of the config: name, shape in the file, expected shape.

    transformers 5.17 loads such weights from a .gguf file, and does not report them.
    """
    with torch.device("meta"):
        expected = dict(type(network)(network.config).named_parameters())
    for name, own in network.named_parameters():
        if name in expected and own.shape != expected[name].shape:
            yield name, own.shape, expected[name].shape


def _open(path: Path) -> GGUFReader:
    """Read the header of a file. Raises LoadingError if it is damaged."""
    if (start := first_bytes(path, 4)) != b"GGUF":
        raise LoadingError(
            f"cannot read {path}: it begins with {start!r} instead of b'GGUF'; download it again"
        )
    try:
        reader = _Reader(path)
        if not reader.fields or "general.architecture" not in reader.fields:
            raise ValueError("its header names no architecture")
    except Exception as error:
        # The errors of numpy (index out of bounds, cannot reshape array) do not explain the cause.
        raise LoadingError(
            f"cannot read {path}: its header is damaged, or the file is truncated ({path.stat().st_size} "
            f"bytes): {one_line(error)}; download it again"
        ) from error
    return reader


class _Reader(GGUFReader):
    """Reads a header from a plain array: numpy takes several times as long to slice a memmap.

    A header has hundreds of thousands of slices, one per token of the vocabulary and more.
    """

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray[Any, Any]) -> None:
        self._data = mapped.view(np.ndarray)


@contextmanager
def _reused(reader: GGUFReader) -> Iterator[None]:
    """Make transformers reuse the header that is already read, and its table of tensor names.

    Otherwise it would read the header again, and make the table once per module of the network.
    """
    module: Any = gguf
    original, names = module.GGUFReader, module.get_tensor_name_map
    module.GGUFReader = lambda path: reader
    module.get_tensor_name_map = functools.cache(names)
    try:
        yield
    finally:
        module.GGUFReader, module.get_tensor_name_map = original, names


def _metadata(reader: GGUFReader) -> Metadata:
    """Collect the metadata of the header, and the rope factors, which are small tensors."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return Metadata(
        {name: field.contents() for name, field in reader.fields.items()},
        {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()},
        {
            name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(-1)
            for name, tensor in tensors.items()
            if name in _ROPE_FACTORS
        },
    )


def _require_all(metadata: Metadata, config: Any) -> None:
    """Reject a file with missing or unknown tensors, by their names, before any tensor is read."""
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        network = auto.from_config(config, trust_remote_code=False)
    kind: Any = TENSOR_PROCESSORS.get(metadata.architecture, TensorProcessor)
    processor = kind()
    needed = {_full_name(name) for name in get_gguf_hf_weights_map(network, processor)}
    if config.tie_word_embeddings:
        needed.discard("output.weight")
    held = {_full_name(name) for name in metadata.tensors} - _ROPE_FACTORS
    missing, unknown = sorted(needed - held), sorted(held - needed)
    if missing:
        raise LoadingError(
            f"it lacks {len(missing)} of the model's {len(needed)} tensors, the first of them {missing[0]}; "
            f"it is incomplete, or one part of several (join them with `llama-gguf-split --merge`)"
        )
    if unknown:
        raise UnsupportedModel(
            f"it holds {len(unknown)} unsupported tensors, the first of them {unknown[0]}; without them the "
            f"answers would be wrong. Use the model's original folder (config.json and safetensors)"
        )


def _full_name(name: str) -> str:
    """Return the name of a tensor in the file; transformers omits the suffix for experts."""
    return name if name.endswith((".weight", ".bias")) else f"{name}.weight"


def seal(folder: Path) -> None:
    """Write a manifest with the size of every file, and sync all files: the folder is then complete."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / _MANIFEST).write_text(json.dumps({"sizes": sizes}, indent=1))
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _eos_ids(path: Path, metadata: Metadata) -> set[int]:
    """Return the ids that end a turn: those in the metadata, and special tokens known to end turns."""
    values = metadata.values
    texts, kinds = (values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if not texts:
        raise LoadingError(f"{path} has no tokenizer (tokenizer.ggml.tokens); use a file that contains one")
    ids = {values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    ids.update(
        index
        for index, (text, kind) in enumerate(zip(texts, kinds or (), strict=False))
        if kind == _CONTROL and text in END_OF_TURN
    )
    vocabulary = metadata.tensors["token_embd.weight"][0]
    return {index for index in ids if isinstance(index, int) and 0 <= index < vocabulary}


def _is_complete(folder: Path) -> bool:
    """Return whether the folder exists and every file has its size in the manifest."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed or the process ends
        yield
