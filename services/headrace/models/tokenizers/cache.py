"""Keep what was read from a tokenizer's files, so that the next start need not import transformers.

transformers takes two seconds of CPU time and 300 MiB to read a tokenizer that is then a
`tokenizers.Tokenizer`, a chat template and the names of some special tokens. These are written to one JSON
file, whose name is a digest of everything they follow from: the contents of the model's files and the
versions of the libraries that read them. A file of the cache is therefore never out of date.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from headrace.models import file_digest

_FORMAT = "1"  # of the files here, and of the code that reads a tokenizer; part of their names
_READERS = ("transformers", "tokenizers", "sentencepiece", "gguf", "protobuf")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


@dataclass(frozen=True)
class Contents:
    """What a tokenizer's files amount to.

    backend         the `tokenizers.Tokenizer`, as JSON
    templates       chat templates by name; "default" where there is only one without a name
    special_tokens  special tokens by their role, such as bos_token
    """

    backend: str
    templates: Mapping[str, str]
    special_tokens: Mapping[str, Any]


def location(path: Path, cache: Path) -> Path:
    """Return the file of the cache for the model at *path*, a folder or a .gguf file."""
    state = hashlib.sha256()
    for part in (_FORMAT, *(f"{name} {_version(name)}" for name in _READERS)):
        state.update(f"{part}\n".encode())
    if path.is_file():
        state.update(file_digest(path).encode())
    else:
        for file in sorted(path.iterdir()):
            if file.is_file() and file.suffix not in _WEIGHTS:
                state.update(f"{file.name}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return cache / "tokenizers" / f"{state.hexdigest()[:32]}.json"


def load(file: Path) -> Contents | None:
    """Return what was kept in *file*; None if nothing was, or it is damaged."""
    try:
        kept: dict[str, Any] = json.loads(file.read_bytes())
        return Contents(**kept)
    except (OSError, ValueError, TypeError):
        return None


def keep(contents: Contents, file: Path) -> None:
    """Write *file* whole or not at all. A cache that cannot be written costs later starts their time only."""
    with suppress(OSError, TypeError, ValueError):  # the last two: tokens that JSON has no form for
        text = json.dumps(asdict(contents))
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=".unfinished-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as unfinished:
                unfinished.write(text)
            os.replace(scratch, file)
        finally:
            Path(scratch).unlink(missing_ok=True)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
