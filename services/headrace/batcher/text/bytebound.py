"""Bound from below how many tokens a text has, from its bytes alone: cheap proof that it cannot fit.

No token stands for more bytes than the longest one of the vocabulary, so a text of n bytes has at least
n / longest tokens. That holds only where every byte of the text reaches some token, so a tokenizer is judged
by its definition (`tokenizer.json`): each of its steps must be one that is known to keep all text. Steps that
drop or shorten text (strip, lower-case, collapse blanks, replace by patterns), tokens that swallow the blanks
around them, unknown characters that join into one token, and kinds of model other than BPE and Unigram have
no bound. For those nothing is refused by its bytes. Bytes that a byte-level vocabulary lacks make no tokens
and are not counted: SmolLM2 has none for some control characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

# Most bytes of text that one byte of its composed form (Unicode's NFC) stands for: U+1FBE and two accents,
# seven bytes, become the two of U+0390.
NFC_SHRINK = 4

_LOSSLESS_SPLITS = {"Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"}
_LOSSLESS_PRETOKENIZERS = {"ByteLevel", "Digits", "Metaspace", "UnicodeScripts"}
_BLANK = "\u2581"  # what SentencePiece writes for a blank


@dataclass(frozen=True, slots=True)
class ByteBound:
    """What one token stands for at most.

    longest   bytes of the longest token
    shrink    most bytes of text for one byte that the tokenizer reads, where the text is not ASCII
    lost      bytes that may make no token
    """

    longest: int
    shrink: int = 1
    lost: bytes = b""

    def fewest_tokens(self, text: str) -> int:
        """The fewest tokens that *text* can have. Linear, about a millisecond a megabyte."""
        count = len(text.encode().translate(None, self.lost))
        return -(-count // (self.longest if text.isascii() else self.longest * self.shrink))


def byte_bound(definition: dict[str, Any]) -> ByteBound | None:
    """The bound of the tokenizer that `tokenizer.json` defines; None where none is known to hold."""
    model, added = definition["model"], definition.get("added_tokens") or []
    normalizers = list(_steps(definition.get("normalizer"), "normalizers"))
    pretokenizers = list(_steps(definition.get("pre_tokenizer"), "pretokenizers"))
    if definition.get("truncation") or any(token["lstrip"] or token["rstrip"] for token in added):
        return None
    if not all(map(_keeps_text, normalizers)) or not all(map(_keeps_pieces, pretokenizers)):
        return None
    if model["type"] not in {"BPE", "Unigram"}:
        return None
    vocabulary = _tokens(model)
    bytewise = any(step["type"] == "ByteLevel" for step in (*normalizers, *pretokenizers))
    if not bytewise and not _falls_back(model, vocabulary):
        return None
    lost = bytes(place for place, letter in enumerate(BYTE_LETTERS) if bytewise and letter not in vocabulary)
    shrink = NFC_SHRINK if any(step["type"] == "NFC" for step in normalizers) else 1
    if lost and shrink > 1:
        return None  # composing may make lost bytes of others
    # In a byte-level vocabulary each character stands for a byte. Elsewhere U+2581 may stand for itself.
    longest = max(len(token) if bytewise else len(token.encode()) for token in vocabulary)
    longest = max(longest, *(len(token["content"].encode()) for token in added), 1)
    return ByteBound(longest, shrink, lost)


def _steps(step: dict[str, Any] | None, parts: str) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for part in step[parts]:
            yield from _steps(part, parts)
    else:
        yield step


def _keeps_text(normalizer: dict[str, Any]) -> bool:
    """Whether it loses no text, but for what `NFC_SHRINK` says."""
    if normalizer["type"] == "Replace":
        return bool(normalizer["pattern"] == {"String": " "} and normalizer["content"] == _BLANK)
    return normalizer["type"] in {"NFC", "Prepend", "ByteLevel"}


def _keeps_pieces(pretokenizer: dict[str, Any]) -> bool:
    if pretokenizer["type"] in {"Split", "Punctuation"}:
        return pretokenizer["behavior"] in _LOSSLESS_SPLITS
    return pretokenizer["type"] in _LOSSLESS_PRETOKENIZERS


def _tokens(model: dict[str, Any]) -> Set[str]:
    if model["type"] == "Unigram":
        return {token for token, _ in model["vocab"]}
    return set(model["vocab"])


def _falls_back(model: dict[str, Any], vocabulary: Set[str]) -> bool:
    """Whether what is unknown becomes a token for each byte: else it may vanish, or join into one token."""
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))


def _byte_letters() -> Iterator[str]:
    """The character that a byte-level vocabulary has for each byte (GPT-2's table)."""
    others = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            yield chr(byte)
        else:
            yield chr(256 + others)
            others += 1


BYTE_LETTERS = tuple(_byte_letters())
