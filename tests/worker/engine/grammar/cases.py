"""Grammars of a small vocabulary, for the tests of engines."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import llguidance

from headrace.grammars.compiling import Grammars
from headrace.grammars.vocabulary import Vocabulary

LETTERS = 'abcdefgh{}": ,0123456789'


def letters(size: int, *, end: int = 0) -> Grammars:
    """Return grammars of a vocabulary of *size*: an end, some texts of one or two letters, and unused ids."""
    texts = [*LETTERS, *(left + right for left in "ab1{" for right in 'ab2"')]
    tokens = [text.encode() for text in texts]
    tokens.insert(end, b"")
    tokens = tokens[:size] + [b""] * (size - len(tokens))

    def encode(text: str) -> list[int]:
        return [tokens.index(letter.encode()) for letter in text]

    return Grammars(Vocabulary(tokens, specials={"<end>": end}, eos_ids=[end], encode=encode))


def regex(text: str) -> str:
    return str(llguidance.LLMatcher.grammar_from_regex(text))


def schema(**properties: object) -> str:
    return str(
        llguidance.LLMatcher.grammar_from_json_schema(
            {
                "type": "object",
                "properties": properties,
                "required": [*properties],
                "additionalProperties": False,
            },
            overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
        )
    )


def matches(pattern: str, grammars: Grammars, ids: Sequence[int]) -> bool:
    """Return whether the text of ids matches a regular expression."""
    text = b"".join(grammars.vocabulary.tokens[id] for id in ids).decode()
    return re.fullmatch(pattern, text) is not None


PERSON = schema(
    name={"type": "string"}, age={"type": "integer"}, tags={"type": "array", "items": {"enum": ["x", "y"]}}
)


def is_person(text: bytes) -> bool:
    """Return whether a text is JSON of PERSON."""
    value = json.loads(text)
    return list(value) == ["name", "age", "tags"] and {*value["tags"]} <= {"x", "y"}
