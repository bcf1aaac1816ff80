"""The form of one answer: what its tokens may be, and how its text is split into parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace.batcher.tools.families import Family


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What `tools.forms` makes of a request and its prompt.

    grammar    in llguidance's format; empty: any tokens
    family     how calls in the answer are written; None: it has none, and all its text is text
    tools      names of the tools that it may call
    reasoning  the markers of what the model thinks first, such as ("<think>", "</think>"); None: no such
    thinking   whether the prompt has opened the first marker, so that the answer begins with thoughts
    markers    the markers of calls and thoughts that are special tokens, by id: they have no text. Only these
               tokens are markers then, not the same names in ordinary text
    """

    grammar: str = ""
    family: Family | None = None
    tools: frozenset[str] = frozenset()
    reasoning: tuple[str, str] | None = None
    thinking: bool = False
    markers: Mapping[int, str] = field(default_factory=dict)

    @property
    def marker_texts(self) -> dict[int, str]:
        """What stands for each of the markers, by id, in the text that `parser` reads: no text has it."""
        return {id: marker_text(number) for number, id in enumerate(self.markers)}

    @property
    def has_parts(self) -> bool:
        """Whether the answer may have parts other than text."""
        return self.family is not None or self.reasoning is not None


def marker_text(number: int) -> str:
    """Return what stands for the marker with this number: half of a surrogate pair, as no text has it."""
    return chr(0xD800 + number)


FREE = AnswerForm()
