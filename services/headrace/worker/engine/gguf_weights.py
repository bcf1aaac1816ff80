"""Unpack a gguf file once, into a folder that transformers loads in a second.

transformers reads gguf files itself, but takes a quarter to half a minute each time. The unpacked copy
is an ordinary model folder in float32, four to eight times as large as the file; it lies in a cache and
can be deleted at any time.
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

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import GgufConfig

from headrace.worker.engine.refusals import LoadingError, UnsupportedModel

_FORMAT = "1"  # part of the folder's name: a change of what we write leaves old copies alone
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
        raise LoadingError(f"cannot unpack {path} into {folder.parent}: {error}") from error
    return folder


def _unpack(path: Path, folder: Path) -> None:
    try:
        network: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            trust_remote_code=False,
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedModel(f"transformers cannot read {path}: {error}") from error
    # From here on it is a plain model, but transformers remembers, and refuses to save quantised ones.
    network.config.__dict__.pop("quantization_config", None)
    network.hf_quantizer = None
    network.is_quantized = False
    network.generation_config.eos_token_id = sorted(_eos_ids(path, network.generation_config.eos_token_id))
    network.save_pretrained(folder)
    seal(folder)


def seal(folder: Path) -> None:
    """Write down every file's size and bring all to the disk: from here on the folder counts as whole."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / _MANIFEST).write_text(json.dumps({"sizes": sizes}, indent=1))
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _eos_ids(path: Path, known: int | list[int] | None) -> set[int]:
    """Return what ends a turn: what transformers found, and the special tokens known to mean it."""
    ids = {known} if isinstance(known, int) else set(known or ())
    fields = GGUFReader(path).fields
    texts = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"):
        if name in fields:
            ids.add(int(fields[name].contents()))
    ids.update(
        index
        for index, (text, kind) in enumerate(zip(texts, kinds, strict=True))
        if kind == _CONTROL and text in END_OF_TURN
    )
    return ids


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
