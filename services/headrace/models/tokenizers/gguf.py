"""Read the tokenizer of a .gguf file without torch.

transformers builds the tokenizer from the file's metadata. Its own reader of that metadata imports torch,
which a batcher does not need otherwise. This module reads the metadata, and calls what transformers does
after that. The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and
3.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Architectures that transformers has under another name.
_MODEL_TYPES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text"}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a .gguf file by key. Raises ValueError for a damaged file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return _Reader(content).metadata()
        except (struct.error, IndexError) as error:
            raise ValueError("it ends within its metadata") from error


def from_gguf(path: Path) -> Any:
    """Return the tokenizer of a .gguf file as transformers' class. Raises ValueError for a damaged file."""
    from transformers import TokenizersBackend
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    metadata = read_metadata(path)
    architecture = str(metadata.get("general.architecture", ""))
    if "tokenizer.ggml.tokens" not in metadata:
        raise ValueError("it has no tokenizer.ggml.tokens")
    rules, settings = (
        {name: metadata[f"tokenizer.{key}"] for key, name in names.items() if f"tokenizer.{key}" in metadata}
        for names in (GGUF_TOKENIZER_MAPPING["tokenizer"], GGUF_TOKENIZER_MAPPING["tokenizer_config"])
    )
    settings |= _settings(metadata)
    backend, more = convert_gguf_tokenizer(architecture, rules)
    name = TOKENIZER_MAPPING_NAMES.get(_MODEL_TYPES.get(architecture, architecture))
    kind = (tokenizer_class_from_name(name) if name else None) or TokenizersBackend
    return kind(tokenizer_object=backend, **settings, **more)


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens, and whether a text begins with one, as `get_gguf_tokenizer` derives them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    settings: dict[str, Any] = {name: None if id is None else tokens[id] for name, id in ids.items()}
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        settings["add_bos_token"] = metadata.get("tokenizer.ggml.add_bos_token", True)
    elif kind == "gemma4":  # its chat template has the token
        settings["add_bos_token"] = False
    return settings


class _Reader:
    """Reads the values of a file in order."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._at = 0

    def metadata(self) -> dict[str, Any]:
        """Return all keys and values."""
        if self._content[:4] != b"GGUF":
            raise ValueError("it is not a .gguf file")
        self._at = 4
        version, _tensors, keys = self._number("I"), self._number("Q"), self._number("Q")
        if version not in (2, 3):
            raise ValueError(f"it is version {version} of the .gguf format; versions 2 and 3 are supported")
        return {self._string(): self._value(self._number("I")) for _ in range(keys)}

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(kind, 1)[0]
        element, count = self._number("I"), self._number("Q")
        if element == _STRING:
            return [self._string() for _ in range(count)]
        return list(self._numbers(element, count))

    def _numbers(self, kind: int, count: int) -> tuple[Any, ...]:
        if kind not in _NUMBERS:
            raise ValueError(f"its metadata has a value of the unknown type {kind}")
        form = f"<{count}{_NUMBERS[kind]}"
        values = struct.unpack_from(form, self._content, self._at)
        self._at += struct.calcsize(form)
        return values

    def _number(self, letter: str) -> int:
        (value,) = struct.unpack_from(f"<{letter}", self._content, self._at)
        self._at += struct.calcsize(f"<{letter}")
        return int(value)

    def _string(self) -> str:
        length = self._number("Q")
        if length > len(self._content) - self._at:
            raise IndexError(self._at)
        self._at += length
        return self._content[self._at - length : self._at].decode()
