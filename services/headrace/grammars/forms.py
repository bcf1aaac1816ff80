"""Turn the forms that callers ask for into grammars in llguidance's format.

Each function makes one `Part`, which is a grammar of its own (`Part.text`) and can be embedded in a larger
Lark grammar as `@name` (`to_text`). Sizes and contents that need no vocabulary are checked here, with the
place of a fault; `compiling` finds the others. `schemas` reads JSON schemas.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import llguidance

from headrace.grammars.problems import MAX_GRAMMAR, FormProblem
from headrace.grammars.schemas import ANY_OBJECT, read_schema

MAX_REGEX_BYTES = 16 << 10
MAX_LARK_BYTES = 64 << 10
MAX_CHOICES = 1024
MAX_CHOICE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Part:
    """A grammar that can stand alone or be embedded in others.

    definition   its entry in llguidance's list of grammars, as JSON without a name: an object with one key
    """

    definition: str

    @property
    def text(self) -> str:
        """The part as a whole grammar."""
        return f'{{"grammars": [{self.definition}]}}'


def to_text(top: str, parts: Mapping[str, Part]) -> str:
    """Return the grammar *top*, in llguidance's Lark, in which `@name` stands for the part of that name.

    parts   by name: letters, digits and underscores
    """
    listed = [_entry("lark_grammar", top)]
    for name, part in parts.items():
        listed.append(f'{{"name": {json.dumps(name)}, {part.definition[1:]}')
    return f'{{"grammars": [{", ".join(listed)}]}}'


def literal(text: str) -> str:
    """Return *text* as a literal of a Lark grammar, quoted."""
    return json.dumps(text)


def json_schema_grammar(schema: str) -> Part:
    """Return the grammar of JSON values that match a JSON schema, itself in JSON.

    The values have ", " and ": " as separators and no other white space. Raises FormProblem for a schema
    that is malformed, too large, or has keywords that cannot be enforced.
    """
    part = Part(_entry("json_schema", read_schema(schema)))
    if len(part.definition) > MAX_GRAMMAR:  # formats are written as patterns, which are longer
        raise FormProblem("the schema becomes too large a grammar: make it smaller")
    return part


def json_object() -> Part:
    """Return the grammar of any JSON object, with the separators of `json_schema_grammar`."""
    return Part(_entry("json_schema", ANY_OBJECT))


def regex(pattern: str) -> Part:
    """Return the grammar of texts that match a regular expression, of Rust's syntax, as a whole.

    `\\d` is 0 to 9 only, as in patterns of JSON schemas: models may choose digits of any script otherwise.
    """
    _check_size("the regular expression", pattern, MAX_REGEX_BYTES)
    return _lark(f"start: /{llguidance.regex_to_lark(pattern, use_ascii='d')}/")


def choices(texts: Sequence[str]) -> Part:
    """Return the grammar of texts of which an answer is one. Raises FormProblem with the place."""
    check_choices(texts)
    return _lark(f"start: TEXT\nTEXT: {' | '.join(literal(text) for text in texts)}")


def lark(grammar: str) -> Part:
    """Return the grammar that *grammar*, in llguidance's variant of Lark, describes from its rule `start`."""
    _check_size("the grammar", grammar, MAX_LARK_BYTES)
    return _lark(grammar)


def _lark(grammar: str) -> Part:
    return Part(_entry("lark_grammar", grammar))


def check_choices(texts: Sequence[str]) -> None:
    """Check texts to choose from. Raises FormProblem with the place, such as "/2"."""
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise FormProblem(f"there are {len(texts)} texts, must be 1 to {MAX_CHOICES}")
    seen: dict[str, int] = {}
    for place, text in enumerate(texts):
        size = len(text.encode())
        if not 1 <= size <= MAX_CHOICE_BYTES:
            raise FormProblem(f"a text has {size} bytes, must be 1 to {MAX_CHOICE_BYTES}", f"/{place}")
        if (first := seen.setdefault(text, place)) != place:
            raise FormProblem(f"the text is the same as /{first}: leave it out", f"/{place}")


def _check_size(what: str, text: str, most: int) -> None:
    if not text:
        raise FormProblem(f"{what} is empty")
    if len(text) > most or len(text.encode()) > most:
        raise FormProblem(f"{what} has more than {most} bytes")


def _entry(kind: str, value: object) -> str:
    return json.dumps({kind: value}, ensure_ascii=False)
