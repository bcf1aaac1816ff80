"""Turn a growing list of token ids into text, piece by piece.

Two things keep text back: bytes that are not yet a whole character, and the beginning of what may
become a stop text. What has been released after n tokens is a function of those n tokens alone, so an
answer that is carried on elsewhere goes on with the very next character.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SILENT_IDS = 8  # in a row without any text that are kept; only special tokens make longer rows


class Detokenizer:
    """Decodes one answer; the texts it returns add up to the decoding of all its ids.

    Only a short tail of ids is decoded each time (the windowed scheme of vLLM and TGI): ids from
    `_begin` on give the tail, of which the ids before `_read` were returned already. They stay in the
    window because some tokenizers decode a token differently at the start of a text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._begin = 0
        self._read = 0

    def feed(self, id: int) -> str:
        """The text that *id* completes; empty while a character is incomplete."""
        self._ids.append(id)
        before = self._decode(self._ids[self._begin : self._read])
        now = self._decode(self._ids[self._begin :])
        if now == before and len(self._ids) - self._read > _SILENT_IDS:
            self._ids.pop()  # else a long row of them would be decoded again for each one more
        # A real U+FFFD waits for its neighbour as well; `flush` gives what never got one.
        if len(now) <= len(before) or now.endswith(REPLACEMENT):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """What was kept back, U+FFFD where its bytes are no character."""
        before = self._decode(self._ids[self._begin : self._read])
        now = self._decode(self._ids[self._begin :])
        self._begin = self._read = len(self._ids)
        return now[len(before) :]


class StopFinder:
    """Looks for stop texts in a stream of text.

    stops   texts of at least one character; of those that match first, the earlier in the list wins
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Returns the text that is certain now, and the stop text that was found, if any.

        After one was found, text up to it has been returned and the rest is gone.
        """
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at, order) for order, stop in enumerate(self._stops) if (at := text.find(stop)) >= 0]
        if found:
            at, order = min(found)
            self._held = ""
            return text[:at], self._stops[order]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back: the stop text never came."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of *text* that is a true beginning of *stop*."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


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

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(decode)
        self._finder = StopFinder(stops)

    def feed(self, ids: Sequence[int]) -> Piece:
        """Take the next ids. Not to be called again after a piece that stopped."""
        texts = []
        for used, id in enumerate(ids, 1):
            text, stopped = self._finder.feed(self._detokenizer.feed(id))
            texts.append(text)
            if stopped is not None:
                return Piece("".join(texts), used, stopped)
        return Piece("".join(texts), len(ids))

    def flush(self) -> Piece:
        """The answer is over: release what was kept back, unless it holds a stop text after all."""
        text, stopped = self._finder.feed(self._detokenizer.flush())
        return Piece(text if stopped is not None else text + self._finder.flush(), 0, stopped)
