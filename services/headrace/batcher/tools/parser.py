"""Split the text of an answer, as it arrives, into reasoning, text and calls of tools.

What is released after some text depends on that text alone, not on the pieces in which it came. Text is held
back while it may be a marker or the beginning of a call, and white space while a marker may follow it; both
are bounded. The arguments of a call are released as they come. What is not a call after all is text, also a
call of a tool that the request does not have. The sources of all parts, joined, are the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from headrace.batcher.tools.form import AnswerForm, marker_text
from headrace.batcher.tools.formats import Format, format_of
from headrace.batcher.tools.shapes import ObjectEnd, Shape, marker_shape

_SPACE = " \t\r\n"
# White space in front of a marker is part of the markup, up to this many characters.
MAX_HELD_SPACE = 16


class Kind(Enum):
    """What a part of an answer is."""

    TEXT = "text"
    REASONING = "reasoning"
    CALL = "call"  # the beginning of a call, with its name
    ARGUMENTS = "arguments"
    MARKUP = "markup"


class Part(NamedTuple):
    """A part of an answer.

    source   its characters, markup included
    call     of a call and its arguments: the place of the call among those of the answer, from 0
    name     of a call: the tool's
    """

    kind: Kind
    source: str
    call: int = 0
    name: str = ""


class AnswerParser:
    """Splits the text of one answer."""

    def __init__(self, form: AnswerForm) -> None:
        self._tools = form.tools
        self._thinking = form.thinking
        names = tuple(form.markers.values())
        texts = {name: marker_text(number) for number, name in enumerate(names)}
        self._open, self._close = (texts.get(marker, marker) for marker in form.reasoning or ("", ""))
        self._format = format_of(form.family, names) if form.family is not None else Format()
        self._special = re.compile(f"([{''.join(texts.values())}])") if texts else None
        self._text = ""  # not released yet
        self._parts: list[Part] = []
        self._call = -1
        self._marked = 0  # of the text that is held back: up to the end of the marker of a call
        self._object = ObjectEnd()
        self._bare = False
        self._skips_space = form.thinking
        self._final = False
        self._step: Callable[[], bool] = self._begin if form.reasoning is not None else self._start

    def feed(self, text: str) -> list[Part]:
        """Return what can be released with the next piece."""
        self._text += text
        while self._step():
            pass
        parts, self._parts = self._parts, []
        return parts

    @property
    def holds_text(self) -> bool:
        """Whether text is held back."""
        return bool(self._text)

    def finish(self) -> list[Part]:
        """Return what was held back: the answer has ended."""
        self._final = True
        return self.feed("")

    # The steps. Each releases what it can, and returns whether another step continues with the rest.

    def _begin(self) -> bool:
        """Whether the answer begins with thoughts."""
        opener = marker_shape(self._open)
        if (found := opener.match(self._text)) is not None:
            self._release(Kind.MARKUP, found.end())
            self._skips_space = True
            self._step = self._think
            return True
        if self._may_follow([opener]):
            return False
        self._step = self._think if self._thinking else self._start
        return True

    def _think(self) -> bool:
        if not self._after_space():
            return False
        if (found := self._find(self._close)) is None:
            self._release_unless_held(Kind.REASONING, self._close)
            return False
        start, end = found
        self._release(Kind.REASONING, start)
        self._release(Kind.MARKUP, end - start)
        self._skips_space = True
        self._step = self._start
        return True

    def _start(self) -> bool:
        """Whether the answer, or what follows the thoughts, begins with a call."""
        if self._format.starts and self._skips_space and not self._after_space():
            return False
        if self._begins_call(self._format.starts):
            return True
        if self._may_follow(self._format.starts):
            return False
        self._step = self._read
        return True

    def _read(self) -> bool:
        """Release text up to a marker."""
        if not self._after_space():
            return False
        marker = self._format.marker
        if not marker:
            self._release(Kind.TEXT, len(self._text))
            return False
        if (found := self._find(marker)) is None:
            self._release_unless_held(Kind.TEXT, marker)
            return False
        start, end = found
        self._release(Kind.TEXT, start)
        self._marked = end - start
        self._step = self._head
        return True

    def _head(self) -> bool:
        """Whether a call follows the marker."""
        if self._begins_call(self._format.heads, self._marked):
            return True
        if self._may_follow(self._format.heads, self._marked):
            return False
        self._release(Kind.TEXT, self._marked)
        self._step = self._read
        return True

    def _arguments(self) -> bool:
        end = self._object.feed(self._text)
        self._release(Kind.ARGUMENTS, len(self._text) if end is None else end, self._call)
        if end is None:
            return False
        self._step = self._more if self._bare else self._tail
        return True

    def _tail(self) -> bool:
        if self._closes(self._format.tails):
            self._step = self._more
            return True
        if self._may_follow(self._format.tails):
            return False
        self._end_of_calls()
        return True

    def _more(self) -> bool:
        """Whether a call is followed by another one, or by markup."""
        if self._begins_call(self._format.more):
            return True
        if self._may_follow(self._format.more):
            return False
        self._step = self._close_calls
        return True

    def _close_calls(self) -> bool:
        if self._closes(self._format.closers):
            return True
        if self._may_follow(self._format.closers):
            return False
        self._end_of_calls()
        return True

    def _end_of_calls(self) -> None:
        self._skips_space = True
        if self._final and any(
            shape.may_follow(self._text) for shape in (*self._format.tails, *self._format.closers)
        ):
            self._release(Kind.MARKUP, len(self._text))  # of a call that was cut off in its markup
        self._step = self._read

    # What steps have in common.

    def _begins_call(self, shapes: Iterable[Shape], at: int = 0) -> bool:
        """Begin a call if the text from *at* on has one of *shapes* and names a tool."""
        for shape in shapes:
            if (found := shape.match(self._text, at)) is not None and found["name"] in self._tools:
                self._call += 1
                self._release(Kind.CALL, found.end() - 1, self._call, found["name"])
                self._bare = shape.bare
                self._object = ObjectEnd()
                self._step = self._arguments
                return True
        return False

    def _closes(self, shapes: Iterable[Shape]) -> bool:
        for shape in shapes:
            if (found := shape.match(self._text)) is not None:
                self._release(Kind.MARKUP, found.end())
                return True
        return False

    def _may_follow(self, shapes: Sequence[Shape], at: int = 0) -> bool:
        """Whether the text from *at* on may still become one of *shapes*."""
        return not self._final and any(shape.may_follow(self._text, at) for shape in shapes)

    def _after_space(self) -> bool:
        """Drop white space after markup. Returns whether there is text after it."""
        if self._skips_space:
            rest = self._text.lstrip(_SPACE)
            self._release(Kind.MARKUP, len(self._text) - len(rest))
            self._skips_space = not rest
        return bool(self._text)

    def _find(self, marker: str) -> tuple[int, int] | None:
        """Return where the marker is, with the white space in front of it."""
        at = self._text.find(marker)
        if at < 0:
            return None
        return self._space_before(at), at + len(marker)

    def _release_unless_held(self, kind: Kind, marker: str) -> None:
        """Release the text, but for what may be the beginning of a marker, and the white space before."""
        text, end = self._text, len(self._text)
        if not self._final:
            at = text.find(marker[0], max(end - len(marker) + 1, 0))
            while at >= 0 and not marker.startswith(text[at:]):
                at = text.find(marker[0], at + 1)
            end = self._space_before(at if at >= 0 else end)
        self._release(kind, end)

    def _space_before(self, end: int) -> int:
        first = max(end - MAX_HELD_SPACE, 0)
        return first + len(self._text[first:end].rstrip(_SPACE))

    def _release(self, kind: Kind, count: int, call: int = 0, name: str = "") -> None:
        if not count and kind is not Kind.CALL:
            return
        source, self._text = self._text[:count], self._text[count:]
        # Outside of markup, markers that are special tokens have no text.
        if self._special is not None and kind in (Kind.TEXT, Kind.REASONING, Kind.ARGUMENTS):
            for place, piece in enumerate(self._special.split(source)):
                self._append(Part(Kind.MARKUP, piece) if place % 2 else Part(kind, piece, call))
        else:
            self._append(Part(kind, source, call, name))

    def _append(self, part: Part) -> None:
        if not part.source:
            return
        if part.kind is not Kind.CALL and self._parts:
            last = self._parts[-1]
            if last.kind is part.kind and last.call == part.call:
                self._parts[-1] = last._replace(source=last.source + part.source)
                return
        self._parts.append(part)
