"""Split a stream of server-sent events into the data of its events.

By the rules of https://html.spec.whatwg.org/multipage/server-sent-events.html, as far as APIs use them: lines
end with LF, CR LF or CR; an empty line ends an event; the data of its lines are joined; comments and other
fields are skipped; a byte order mark may come first. Unlike there, an event that the stream ends without an
empty line counts: some servers leave out the last one. Plain data, no I/O.
"""

from __future__ import annotations

import re

MAX_EVENT_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventTooLong(Exception):
    """An event, or a line, has more bytes than are accepted."""


class EventSplitter:
    """The events of one stream, which arrives in pieces of any size.

    most   bytes of one event; each byte is looked at a few times at most, however small the pieces are
    """

    def __init__(self, most: int = MAX_EVENT_BYTES) -> None:
        self._most = most
        self._line = bytearray()  # the begin of a line that is not complete
        self._data: list[bytes] = []  # of the event that is not complete
        self._size = 0  # of these, and of the lines of it that were skipped
        self._after_cr = False  # a line feed that follows belongs to the end of the line before
        self._first = True

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of the events that *piece* completes. Raises EventTooLong."""
        if self._after_cr and piece:
            self._after_cr = False
            if piece.startswith(b"\n"):
                piece = piece[1:]
        if piece.endswith(b"\r"):
            self._after_cr = True
        *lines, rest = _LINE_END.split(piece)
        events: list[bytes] = []
        for line in lines:
            if self._line:
                self._line += line
                line = bytes(self._line)
                self._line.clear()
            self._add(line, events)
        self._line += rest
        if self._size + len(self._line) > self._most:
            raise EventTooLong(f"an event has more than {self._most} bytes")
        return events

    def end(self) -> list[bytes]:
        """Return the data of an event that no empty line has ended, if there is one."""
        events: list[bytes] = []
        if self._line:
            self._add(bytes(self._line), events)
            self._line.clear()
        self._add(b"", events)
        return events

    def _add(self, line: bytes, events: list[bytes]) -> None:
        """Process a complete line."""
        if self._first:
            self._first = False
            line = line.removeprefix(_BOM)
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
            self._size = 0
            return
        self._size += len(line)
        if self._size > self._most:
            raise EventTooLong(f"an event has more than {self._most} bytes")
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
