"""Turn text into token ids and back.

A tokenizer's methods are plain and may be slow: callers run `encode_*` off the event loop. Streams of
ids become text in `detokenizer.py`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from headrace import errors
from headrace.batcher.bytebound import ByteBound, byte_bound
from headrace.models import tokenizer_fingerprint


class Tokenizer(Protocol):
    """Knows one model's tokens and chat template. Safe to use from several threads."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokenizers; compared with what a worker says of its model."""
        ...

    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Lay out (role, content) turns, with the opening of the answer. Raises InvalidRequest."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Ids of raw text, with the special tokens that the model wants in front."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of *ids*, special tokens left out, U+FFFD where bytes are no character."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """What a tokenizer may offer besides: proof from a text's bytes that it has too many tokens.

    bound   what holds for all of its texts; None: nothing is known
    """

    @property
    def bound(self) -> ByteBound | None:
        """See above."""
        ...

    def lay_out(self, turns: Sequence[tuple[str, str]]) -> str:
        """The text that `encode_chat` makes tokens of. Raises InvalidRequest."""
        ...


class ByteTokenizer:
    """One id per byte of UTF-8: the tokenizer of the echo engine, which needs no files."""

    fingerprint = "bytes-1"
    bound: ByteBound | None = ByteBound(1)

    def lay_out(self, turns: Sequence[tuple[str, str]]) -> str:
        """The last turn's content; an echo has no use for the rest."""
        return turns[-1][1]

    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """See `lay_out`."""
        return self.encode_text(self.lay_out(turns))

    def encode_text(self, text: str) -> list[int]:
        """The bytes of *text*."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes; ids above 255 are special."""
        return bytes(id for id in ids if id < 256).decode(errors="replace")


class TransformersTokenizer:
    """The tokenizer of a model folder, as transformers loads it; made by `load_tokenizer`."""

    def __init__(self, tokenizer: Any, fingerprint: str) -> None:
        self._tokenizer = tokenizer
        self._fast = tokenizer.backend_tokenizer
        self._fingerprint = fingerprint
        self.bound = byte_bound(json.loads(self._fast.to_str()))

    @property
    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return self._fingerprint

    def lay_out(self, turns: Sequence[tuple[str, str]]) -> str:
        """See `Bounded`. Raises InvalidRequest for turns that the template refuses."""
        if self._tokenizer.chat_template is None:
            raise errors.InvalidRequest(
                "this model has no chat template: send `prompt` instead of `chat`", field="chat"
            )
        messages = [{"role": role, "content": content} for role, content in turns]
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise errors.InvalidRequest(
                f"the model's chat template refuses these messages: {error}", field="chat.messages"
            ) from error
        return str(text)

    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """See `Tokenizer` and `lay_out`."""
        # The template has written what special tokens the model wants.
        return list(self._tokenizer(self.lay_out(turns), add_special_tokens=False)["input_ids"])

    def encode_text(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`. Skips the wrapper of transformers: 4 us instead of 40 for a few ids."""
        return str(self._fast.decode(ids, skip_special_tokens=True))


def load_tokenizer(path: Path, cache: Path) -> TransformersTokenizer:
    """The tokenizer of the model at *path*, a folder or a .gguf file.

    cache   where the tokenizer taken out of a .gguf is kept: taking it out costs seconds
    """
    from transformers import AutoTokenizer

    fingerprint = tokenizer_fingerprint(path)
    folder = path
    if path.suffix == ".gguf":
        folder = cache / "tokenizers" / fingerprint
        if not folder.exists():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            _keep(tokenizer, folder)
    return TransformersTokenizer(AutoTokenizer.from_pretrained(folder), fingerprint)


def _keep(tokenizer: Any, folder: Path) -> None:
    """Save whole or not at all: another batcher may be doing the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
    try:
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # else somebody was quicker
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
