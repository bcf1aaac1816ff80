"""Define the error of forms that cannot be enforced."""

from __future__ import annotations


class FormProblem(Exception):
    """A form that callers ask for is malformed, too large, or cannot be enforced.

    message   what to change, for people
    place     where in the form, as a JSON pointer; empty: as a whole
    part      the name of the part of the grammar that has the form; empty: unknown, or there is only one
    """

    def __init__(self, message: str, place: str = "", part: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.place = place
        self.part = part
