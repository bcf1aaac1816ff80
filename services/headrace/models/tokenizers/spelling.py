"""Spell the tokens of a tokenizer: what each adds to a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any


class TokenSpelling:
    """The spelling of the tokens of a `tokenizers.Tokenizer`. Safe to use from several threads.

    special_tokens   names and ids of the tokens that have no text
    byte_level       whether each token stands for bytes of UTF-8, so that no text depends on its place
    """

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        decoder = json.dumps(json.loads(fast.to_str())["decoder"])
        self.byte_level = '"ByteLevel"' in decoder
        self._byte_fallback = '"ByteFallback"' in decoder
        self.special_tokens: Mapping[str, int] = {
            token.content: id for id, token in fast.get_added_tokens_decoder().items() if token.special
        }
        self._bytes: dict[int, bytes | None] = {}

    def spell(self, id: int, after: int | None) -> bytes | str:
        """Return what *id* adds to a text: bytes of UTF-8, or whole characters.

        after   a token before it that has text; None at the start of a text, where some tokenizers leave out
                a space

        Special tokens and unknown ids return no bytes.
        """
        try:
            piece = self._bytes[id]
        except KeyError:
            piece = self._bytes[id] = self._spelled(id)
        at_start = after is None and not self.byte_level
        if piece is not None and not (at_start and piece.isascii()):
            return piece
        if after is None:  # a space may be left out here, even if it is a byte
            text = str(self._fast.decode([id]))
            return text if piece is None else text.encode()
        before = self._fast.decode([after])
        return str(self._fast.decode([after, id])[len(before) :])

    def _spelled(self, id: int) -> bytes | None:
        """Return the bytes of a token that stands for bytes or for no text; None for other tokens."""
        token = self._fast.id_to_token(id)
        if token is None or token in self.special_tokens:
            return b""
        if self.byte_level:
            known = _BYTES_OF_LETTERS
            return bytes(map(known.__getitem__, token)) if all(c in known for c in token) else token.encode()
        if self._byte_fallback and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            return bytes.fromhex(byte[1])
        return None


def _byte_letters() -> Iterator[str]:
    """Yield the character by which a byte-level vocabulary writes each byte (GPT-2's table)."""
    others = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            yield chr(byte)
        else:
            yield chr(256 + others)
            others += 1


BYTE_LETTERS = tuple(_byte_letters())
_BYTES_OF_LETTERS = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
