"""Compute a lower bound of the number of tokens of a text from its bytes: cheap proof that it cannot fit.

No token stands for more bytes than the longest token of the vocabulary, so a text of n bytes has at least n /
longest tokens. This holds only if every byte of the text becomes part of a token. So the tokenizer's
definition (`tokenizer.json`) is inspected: each of its steps must be known to preserve all text. There is no
bound for steps that drop or shorten text (strip, lower-case, collapse spaces, replace patterns), for tokens
that absorb the spaces around them, for unknown characters that are merged into one token, and for models
other than BPE and Unigram. Without a bound no text is rejected by its bytes. Bytes that a byte-level
vocabulary lacks produce no tokens and are not counted: SmolLM2 lacks some control characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

from headrace.models.tokenizers.spelling import BYTE_LETTERS

# Most bytes of text per byte of its composed form (Unicode's NFC): U+1FBE and two accents, seven bytes,
# become the two bytes of U+0390.
NFC_SHRINK = 4

_LOSSLESS_SPLITS = {"Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"}
_LOSSLESS_PRETOKENIZERS = {"ByteLevel", "Digits", "Metaspace", "UnicodeScripts"}
_SPACE = "\u2581"  # how SentencePiece writes a space


@dataclass(frozen=True, slots=True)
class ByteBound:
    """The most text that one token can stand for.

    longest   bytes of the longest token
    shrink    most bytes of text per byte that the tokenizer reads, if the text is not ASCII
    lost      bytes that may produce no token
    """

    longest: int
    shrink: int = 1
    lost: bytes = b""

    def min_tokens(self, text: str) -> int:
        """Return the fewest tokens that *text* can have. Takes about a millisecond per megabyte."""
        count = len(text.encode().translate(None, self.lost))
        return -(-count // (self.longest if text.isascii() else self.longest * self.shrink))


def byte_bound(definition: dict[str, Any]) -> ByteBound | None:
    """Return the bound of the tokenizer that `tokenizer.json` defines; None if no bound is known to hold."""
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
        return None  # composition may turn other bytes into lost ones
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
    """Return whether it preserves all text, except for the shortening that `NFC_SHRINK` bounds."""
    if normalizer["type"] == "Replace":
        return bool(normalizer["pattern"] == {"String": " "} and normalizer["content"] == _SPACE)
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
    """Return whether unknown text becomes one token per byte; otherwise it may vanish or become one token."""
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
