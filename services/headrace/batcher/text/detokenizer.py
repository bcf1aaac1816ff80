"""Turn a growing list of token ids into text, piece by piece.

Two things keep text back: bytes that are not yet a whole character, at most three of them, and the
beginning of what may become a stop text. What has been released after n tokens is a function of those n
tokens alone, so an answer that is carried on elsewhere goes on with the very next character. The work for
a token does not depend on how many came before it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# An error handler for `bytes.decode`: one U+FFFD for each byte, as SentencePiece shows broken bytes. Python's
# own "replace" shows one for each broken character, as byte-level tokenizers do.
EACH_BYTE = "headrace.each-byte"


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _each_byte)


class Spelling(Protocol):
    """How single tokens are written.

    broken   the name of the error handler for bytes that are no character, as `bytes.decode` takes it
    """

    broken: str

    def spell(self, id: int, after: int | None) -> bytes | str:
        """What *id* adds to a text: bytes of UTF-8, or whole characters.

        after   a token that comes before it and has text, None at the start of a text; some tokenizers leave
                out a blank there. Special tokens and unknown ids give no bytes.
        """
        ...


class Detokenizer:
    """Decodes one text; the pieces that it returns add up to the text of all ids.

    after   see `Spelling`: for an answer, a token of its prompt
    """

    def __init__(self, spelling: Spelling, after: int | None = None) -> None:
        self._spelling = spelling
        self._after = after
        self._utf8 = codecs.getincrementaldecoder("utf-8")(spelling.broken)

    def feed(self, id: int) -> str:
        """The text that *id* completes; empty while a character is incomplete."""
        piece = self._spelling.spell(id, self._after)
        if isinstance(piece, bytes):
            if piece:
                self._after = id
            return self._utf8.decode(piece)
        self._after = id
        return self.flush() + piece

    def flush(self) -> str:
        """What was kept back: no more bytes of the character come."""
        return self._utf8.decode(b"", final=True)


def last_with_text(spelling: Spelling, ids: Sequence[int]) -> int | None:
    """The last of *ids* that has text; None if none has."""
    return next((id for id in reversed(ids) if spelling.spell(id, id) != b""), None)


@dataclass(frozen=True)
class Stops:
    """What ends an answer.

    texts       of at least one character; of those that match first, the earlier in the list wins
    ids         special tokens that end it as well, and the stop text that each stands for: they have no text
    min_tokens  a stop text counts only if the answer has at least so many tokens, those of the stop text
                included
    """

    texts: Sequence[str] = ()
    ids: Mapping[int, str] = field(default_factory=dict)
    min_tokens: int = 0


class StopFinder:
    """Looks for stop texts in a stream of text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def feed(self, text: str, *, counts: bool = True) -> tuple[str, str | None]:
        """Returns the text that is certain now, and the stop text that was found, if any.

        counts   whether a stop text that ends in *text* ends the answer; if not, it is text like any other

        After one was found, text up to it has been returned and the rest is gone.
        """
        if not self._stops:
            return text, None
        held, text = len(self._held), self._held + text
        if counts:
            found = [
                (at, order)
                for order, stop in enumerate(self._stops)
                # What was held ends in no stop text that counted.
                if (at := text.find(stop, max(held - len(stop) + 1, 0))) >= 0
            ]
            if found:
                at, order = min(found)
                self._held = ""
                return text[:at], self._stops[order]
        kept = self._start_of_a_stop(text)
        self._held = text[kept:]
        return text[:kept], None

    def flush(self) -> str:
        """What was held back: the stop text never came."""
        held, self._held = self._held, ""
        return held

    def _start_of_a_stop(self, text: str) -> int:
        """Where the longest end of *text* begins that is a true beginning of a stop text."""
        for at in range(max(len(text) - self._longest + 1, 0), len(text)):
            end = text[at:]
            if any(stop.startswith(end) and len(stop) > len(end) for stop in self._stops):
                return at
        return len(text)


@dataclass(frozen=True, slots=True)
class Piece:
    """What some ids came to.

    text     certain text, valid UTF-8
    used     how many of the ids belong to the answer: all, or those up to the end of a stop text
    stopped  the stop text that was found
    """

    text: str
    used: int
    stopped: str | None = None


class TextStream:
    """Ids in, certain text out, ending at the first stop text."""

    def __init__(self, detokenizer: Detokenizer, stops: Stops | None = None) -> None:
        self._detokenizer = detokenizer
        self._stops = stops or Stops()
        self._finder = StopFinder(self._stops.texts)
        self._count = 0

    @property
    def _counts(self) -> bool:
        return self._count >= self._stops.min_tokens

    def feed(self, ids: Iterable[int]) -> Piece:
        """Take the next ids. Not to be called again after a piece that stopped."""
        texts = []
        used = 0
        for used, id in enumerate(ids, 1):
            self._count += 1
            if self._counts and id in self._stops.ids:
                texts.append(self._rest())
                return Piece("".join(texts), used, self._stops.ids[id])
            text, stopped = self._finder.feed(self._detokenizer.feed(id), counts=self._counts)
            texts.append(text)
            if stopped is not None:
                return Piece("".join(texts), used, stopped)
        return Piece("".join(texts), used)

    def flush(self) -> Piece:
        """The answer is over: release what was kept back, unless it holds a stop text after all."""
        text, stopped = self._finder.feed(self._detokenizer.flush(), counts=self._counts)
        return Piece(text if stopped is not None else text + self._finder.flush(), 0, stopped)

    def _rest(self) -> str:
        text, _ = self._finder.feed(self._detokenizer.flush(), counts=False)
        return text + self._finder.flush()
