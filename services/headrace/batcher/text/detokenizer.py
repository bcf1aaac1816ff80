"""Decode a stream of token ids to text incrementally, and find stop texts.

Text is held back for two reasons: bytes that are not a complete character yet, at most three, and text that
may be the start of a stop text. The text released after n tokens depends on those n tokens alone, so an
answer that another worker or batcher resumes continues with the next character. The work per token does not
depend on the number of tokens before.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# An error handler for `bytes.decode` that returns one U+FFFD per invalid byte, as SentencePiece does.
# Python's own "replace" returns one per invalid character, as byte-level tokenizers do.
EACH_BYTE = "headrace.each-byte"


_utf8_decoder = codecs.getincrementaldecoder("utf-8")


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _each_byte)


class Spelling(Protocol):
    """The spelling of single tokens.

    decode_errors   the error handler for bytes that are no character, as `bytes.decode` takes it
    """

    decode_errors: str

    def spell(self, id: int, after: int | None) -> bytes | str:
        """Return what *id* adds to a text: bytes of UTF-8, or whole characters.

        after   a token before it that has text; None at the start of a text, where some tokenizers leave out
                a space

        Special tokens and unknown ids return no bytes.
        """
        ...


class Detokenizer:
    """Decodes one text; the pieces that it returns concatenate to the text of all ids.

    after   see `Spelling`: for an answer, a token of its prompt
    """

    def __init__(self, spelling: Spelling, after: int | None = None) -> None:
        self._spelling = spelling
        self._after = after
        self._utf8 = _utf8_decoder(spelling.decode_errors)

    @property
    def after(self) -> int | None:
        """The last token with text; None at the start of a text."""
        return self._after

    def feed(self, id: int) -> str:
        """Return the text that *id* completes; empty while a character is incomplete."""
        piece = self._spelling.spell(id, self._after)
        if isinstance(piece, bytes):
            if piece:
                self._after = id
            return self._utf8.decode(piece)
        self._after = id
        return self.flush() + piece

    def flush(self) -> str:
        """Return the text that was held back: no more bytes of the character follow."""
        return self._utf8.decode(b"", final=True)


def last_with_text(spelling: Spelling, ids: Sequence[int]) -> int | None:
    """Return the last of *ids* that has text; None if none has."""
    return next((id for id in reversed(ids) if spelling.spell(id, id) != b""), None)


@dataclass(frozen=True)
class StopRules:
    """The conditions that end an answer.

    texts       stop texts of at least one character; if several match at the same position, the first in the
                list counts
    ids         special tokens that end the answer as well, which have no text, and the stop text that each
                stands for
    min_tokens  a stop text counts only if the answer has at least this many tokens, those of the stop text
                included
    """

    texts: Sequence[str] = ()
    ids: Mapping[int, str] = field(default_factory=dict)
    min_tokens: int = 0


class StopFinder:
    """Finds stop texts in a stream of text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def feed(self, text: str, *, counts: bool = True) -> tuple[str, str | None]:
        """Return the text that can be released, and the stop text that was found, if any.

        counts   whether a stop text that ends within *text* ends the answer; otherwise it is ordinary text

        Once a stop text is found, the text before it has been returned and the rest is dropped.
        """
        if not self._stops:
            return text, None
        held, text = len(self._held), self._held + text
        if counts:
            found = [
                (at, order)
                for order, stop in enumerate(self._stops)
                # The held text ends in no stop text that counted.
                if (at := text.find(stop, max(held - len(stop) + 1, 0))) >= 0
            ]
            if found:
                at, order = min(found)
                self._held = ""
                return text[:at], self._stops[order]
        kept = self._start_of_stop(text)
        self._held = text[kept:]
        return text[:kept], None

    def flush(self) -> str:
        """Return the text that was held back: no stop text completed it."""
        held, self._held = self._held, ""
        return held

    def _start_of_stop(self, text: str) -> int:
        """Return the start of the longest suffix of *text* that is a proper prefix of a stop text."""
        for at in range(max(len(text) - self._longest + 1, 0), len(text)):
            end = text[at:]
            if any(stop.startswith(end) and len(stop) > len(end) for stop in self._stops):
                return at
        return len(text)


class Piece(NamedTuple):
    """The text released for some ids.

    text     valid UTF-8
    used     how many of the ids belong to the answer: all, or those up to the end of a stop text
    stopped  the stop text that was found
    """

    text: str
    used: int
    stopped: str | None = None


class TextStream:
    """Decodes ids to text up to the first stop text.

    markers   ids of special tokens that are decoded to texts. No stop text contains one, or spans it

    only_decodes   whether nothing ends the text
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopRules | None = None,
        markers: Mapping[int, str] | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops or StopRules()
        self._finder = StopFinder(self._stops.texts)
        self._markers = markers or {}
        self.only_decodes = not (self._stops.texts or self._stops.ids or self._markers)
        self._count = 0

    @property
    def _counts(self) -> bool:
        return self._count >= self._stops.min_tokens

    def feed(self, ids: Sequence[int]) -> Piece:
        """Decode the next ids. Do not call it again after a piece with a stop text."""
        decode = self._detokenizer.feed
        if self.only_decodes:
            return Piece(decode(ids[0]) if len(ids) == 1 else "".join(map(decode, ids)), len(ids))
        texts = []
        used = 0
        for used, id in enumerate(ids, 1):
            self._count += 1
            if self._counts and id in self._stops.ids:
                texts.append(self._rest())
                return Piece("".join(texts), used, self._stops.ids[id])
            if id in self._markers:
                texts += self._rest(), self._markers[id]
                continue
            text, stopped = self._finder.feed(decode(id), counts=self._counts)
            texts.append(text)
            if stopped is not None:
                return Piece("".join(texts), used, stopped)
        return Piece("".join(texts), used)

    def flush(self) -> Piece:
        """Return the text that was held back, at the end of the answer, unless it contains a stop text."""
        text, stopped = self._finder.feed(self._detokenizer.flush(), counts=self._counts)
        return Piece(text if stopped is not None else text + self._finder.flush(), 0, stopped)

    def _rest(self) -> str:
        text, _ = self._finder.feed(self._detokenizer.flush(), counts=False)
        return text + self._finder.flush()
