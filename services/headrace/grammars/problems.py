"""Define the error of forms that cannot be enforced."""

from __future__ import annotations

from headrace.quoting import clipped

MAX_GRAMMAR = 2 << 20  # bytes of a whole grammar, for workers: tools may have schemas of 1 MiB
MAX_PLACE = 256  # bytes in a message


class FormProblem(Exception):
    """A form that callers ask for is malformed, too large, or cannot be enforced.

    message   what to change, for people; on one line
    place     where in the form, as a JSON pointer; empty: as a whole
    part      the name of the part of the grammar that has the form; empty: unknown, or there is only one
    """

    def __init__(self, message: str, place: str = "", part: str = "") -> None:
        super().__init__(message)
        self.message = _printable(message)
        self.place = place
        self.part = part

    def about(self, field: str) -> str:
        """Return a message for people that names the request's field and the place in it."""
        at = f" at {_printable(clipped(self.place, MAX_PLACE))}" if self.place else ""
        return f"{field}{at}: {self.message}"


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)
