"""Match the beginnings of texts that grow: markup of calls, which may not have arrived as a whole."""

from __future__ import annotations

import re
from functools import lru_cache

# More white space than this at one place of the markup is none that models write, and would be held back.
MAX_SPACE = 32
NAME = r"[A-Za-z0-9_.\-]{1,64}"
SPACE = rf"[ \t\r\n]{{0,{MAX_SPACE}}}"
# Of the characters in templates, only these mean something in regular expressions, Python's and Rust's.
_ESCAPED = re.compile(r"[\[\](){}|.*+?^$\\/]")


class Shape:
    """A text with optional white space and at most one name of a tool in it. Its length is bounded.

    template   the text; " " stands for up to MAX_SPACE characters of white space, and "@" for a name

    pattern    the part before the name as a regular expression
    bare       whether it has no object around the arguments
    """

    def __init__(self, template: str) -> None:
        self.template = template
        self.bare = '"name"' not in template
        self.pattern = "".join(map(_atom, template.partition("@")[0]))
        atoms = [f"(?P<name>{NAME})" if letter == "@" else _atom(letter) for letter in template]
        self._whole = re.compile("".join(atoms))
        # Each atom or the end of the text: a text that ends early matches the atoms that it has.
        self._start = re.compile("".join(rf"(?:{atom}|\Z)" for atom in atoms))

    def match(self, text: str, at: int = 0) -> re.Match[str] | None:
        """Return how the text from *at* on begins with this shape."""
        return self._whole.match(text, at)

    def may_follow(self, text: str, at: int = 0) -> bool:
        """Whether the text from *at* on is a proper beginning of this shape."""
        return self._start.fullmatch(text, at) is not None and self._whole.match(text, at) is None


def escaped(text: str) -> str:
    """Return a regular expression, in Python's syntax and Rust's, that matches *text*."""
    return _ESCAPED.sub(r"\\\g<0>", text)


def _atom(letter: str) -> str:
    return SPACE if letter == " " else escaped(letter)


@lru_cache(maxsize=64)  # names in files of models, so few
def marker_shape(marker: str) -> Shape:
    """Return the shape of a marker with white space in front of it."""
    return Shape(f" {marker}")


class ObjectEnd:
    """Finds the end of a JSON object in a text that arrives in pieces."""

    _OUTSIDE = re.compile(r'["{}\[\]]')
    _INSIDE = re.compile(r'["\\]')

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> int | None:
        """Return how many characters of the next piece belong to the object if it ends there; None: all."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (self._INSIDE if self._in_string else self._OUTSIDE).search(text, at)
            if found is None:
                return None
            at, letter = found.end(), found[0]
            if letter == '"':
                self._in_string = not self._in_string
            elif letter == "\\":
                self._escaped = True
            elif letter in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth == 0:
                    return at
        return None
