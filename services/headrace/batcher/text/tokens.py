"""Turn text into token ids and back.

A tokenizer's methods are plain and may be slow: callers run `encode_*` off the event loop. Streams of
ids become text in `detokenizer`, which asks how single tokens are spelled; `tokenizer_files` reads
tokenizers from files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from headrace import errors
from headrace.batcher.text.bytebound import BYTE_LETTERS, ByteBound, byte_bound
from headrace.batcher.text.detokenizer import EACH_BYTE, Spelling
from headrace.batcher.text.specials import Marks, Specials, encode
from headrace.batcher.text.templates import ChatTemplate, Turns, choose_template
from headrace.batcher.text.tokenizer_files import read_tokenizer


class Tokenizer(Spelling, Protocol):
    """Knows one model's tokens and chat template. Safe to use from several threads."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokenizers; compared with what a worker says of its model."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Names and ids of the tokens that have no text."""
        ...

    def encode_chat(self, turns: Turns, *, continue_final: bool = False) -> list[int]:
        """Lay out (role, content) turns. Raises InvalidRequest.

        continue_final   the last turn goes on, instead of the opening of an answer after it

        Contents never become special tokens.
        """
        ...

    def encode_text(self, text: str) -> list[int]:
        """Ids of raw text, with the special tokens that the model wants in front; others may be in it."""
        ...


def stop_ids(tokenizer: Tokenizer, stops: Sequence[str]) -> dict[int, str]:
    """Special tokens among stop texts, and the text that each stands for.

    Raises InvalidSampling for a stop text that holds one beside other text: no answer has such a text.
    """
    special = tokenizer.special_tokens
    for stop in stops:
        if stop not in special and (name := next((name for name in special if name in stop), None)):
            raise errors.InvalidSampling(
                f"sampling.stop holds {stop!r}: {name!r} in it is a special token of this model, which has "
                f"no text in an answer; give {name!r} alone, or its id {special[name]} in stop_token_ids",
                field="sampling.stop",
            )
    return {special[stop]: stop for stop in stops if stop in special}


@runtime_checkable
class Bounded(Protocol):
    """What a tokenizer may offer besides: proof from a text's bytes that it has too many tokens.

    bound   what holds for all of its texts; None: nothing is known
    """

    @property
    def bound(self) -> ByteBound | None:
        """See above."""
        ...

    def lay_out(self, turns: Turns, *, continue_final: bool = False) -> str:
        """The text that `encode_chat` makes tokens of. Raises InvalidRequest."""
        ...


class ByteTokenizer:
    """One id per byte of UTF-8: the tokenizer of the echo engine, which needs no files."""

    fingerprint = "bytes-1"
    bound: ByteBound | None = ByteBound(1)
    broken = "replace"
    special_tokens: Mapping[str, int] = {}

    def lay_out(self, turns: Turns, *, continue_final: bool = False) -> str:
        """The last turn's content; an echo has no use for the rest."""
        return turns[-1][1]

    def encode_chat(self, turns: Turns, *, continue_final: bool = False) -> list[int]:
        """See `lay_out`."""
        return self.encode_text(self.lay_out(turns))

    def encode_text(self, text: str) -> list[int]:
        """The bytes of *text*."""
        return list(text.encode())

    def spell(self, id: int, after: int | None) -> bytes:
        """The byte; ids above 255 are special."""
        return bytes([id]) if id < 256 else b""


class TransformersTokenizer:
    """A tokenizer of a model's files.

    fast       its `tokenizers.Tokenizer`, which becomes this object's own
    template   its chat template, None without one
    """

    def __init__(self, fast: Any, template: ChatTemplate | None, fingerprint: str) -> None:
        fast.no_truncation()  # some files ask for it
        fast.no_padding()
        self._fast = fast
        self._template = template
        self._fingerprint = fingerprint
        description = json.loads(fast.to_str())
        self.bound = byte_bound(description)
        self._specials = Specials(fast, description, template.frame if template else "")
        self._special_tokens = {
            token.content: id for id, token in fast.get_added_tokens_decoder().items() if token.special
        }
        decoder = json.dumps(description["decoder"])
        self._byte_level = '"ByteLevel"' in decoder
        self._byte_fallback = '"ByteFallback"' in decoder
        self.broken = "replace" if self._byte_level else EACH_BYTE
        self._bytes: dict[int, bytes | None] = {}

    @property
    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return self._fingerprint

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """See `Tokenizer`."""
        return self._special_tokens

    def lay_out(self, turns: Turns, *, continue_final: bool = False) -> str:
        """See `Bounded`. Raises InvalidRequest for turns that the template does not take."""
        template = self._chat_template
        marks = self._specials.marks([template.source, *(content for _, content in turns)])
        return _laid_out(template, turns, marks, continue_final)

    def encode_chat(self, turns: Turns, *, continue_final: bool = False) -> list[int]:
        """See `Tokenizer`. Raises InvalidRequest for turns that the template does not take."""
        template, specials = self._chat_template, self._specials
        contents = [content for _, content in turns]
        marks = specials.marks([template.source, *contents])
        text = _laid_out(template, turns, marks, continue_final)
        if not specials.in_doubt(contents):
            return specials.encode(text, marks)
        for names_only in (False, True):
            marked = [(role, specials.mark(content, marks, names_only=names_only)) for role, content in turns]
            laid_out = _laid_out(template, marked, marks, continue_final)
            if marks.off(laid_out) == text:
                break  # else the template looks for one of the marked letters
        return specials.encode(laid_out, marks)

    def encode_text(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return encode(self._fast, text, add_special_tokens=True)

    def spell(self, id: int, after: int | None) -> bytes | str:
        """See `Spelling`."""
        try:
            piece = self._bytes[id]
        except KeyError:
            piece = self._bytes[id] = self._spelled(id)
        at_start = after is None and not self._byte_level
        if piece is not None and not (at_start and piece.isascii()):
            return piece
        if after is None:  # where a blank may be left out, be it a byte
            text = str(self._fast.decode([id]))
            return text if piece is None else text.encode()
        before = self._fast.decode([after])
        return str(self._fast.decode([after, id])[len(before) :])

    @property
    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise errors.InvalidRequest(
                "this model has no chat template: send `prompt` instead of `chat`", field="chat"
            )
        return self._template

    def _spelled(self, id: int) -> bytes | None:
        """The bytes of a token that stands for bytes, or for nothing; None for others."""
        token = self._fast.id_to_token(id)
        if token is None or token in self._special_tokens:
            return b""
        if self._byte_level:
            known = _BYTES_OF_LETTERS
            return bytes(map(known.__getitem__, token)) if all(c in known for c in token) else token.encode()
        if self._byte_fallback and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            return bytes.fromhex(byte[1])
        return None


def _laid_out(template: ChatTemplate, turns: Turns, marks: Marks, continue_final: bool) -> str:
    """The text of the turns, up to where the answer begins."""
    if not continue_final:
        return template.render(turns)
    *before, (role, content) = turns
    text = template.render([*before, (role, content + marks.end)], opening=False)
    if marks.end not in text:
        raise errors.InvalidRequest(
            "the model's chat template changes the last message's end, so it cannot be continued: send "
            "`prompt`, or leave out continue_final_message",
            field="chat.continue_final_message",
        )
    return text[: text.rindex(marks.end)]


_BYTES_OF_LETTERS = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}


def load_tokenizer(path: Path, cache: Path) -> TransformersTokenizer:
    """The tokenizer of the model at *path*, a folder or a .gguf file.

    cache   where the tokenizer taken out of a .gguf is kept: taking it out costs seconds

    Raises ModelUnavailable, in one line that names the file, for files that hold no usable tokenizer.
    """
    read = read_tokenizer(path, cache)
    template = choose_template(read.templates, read.special_tokens)
    return TransformersTokenizer(read.backend, template, read.fingerprint)
