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
    markers    the markers of calls and thoughts that are special tokens, by id: they have no text
    """

    grammar: str = ""
    family: Family | None = None
    tools: frozenset[str] = frozenset()
    reasoning: tuple[str, str] | None = None
    thinking: bool = False
    markers: Mapping[int, str] = field(default_factory=dict)

    @property
    def has_parts(self) -> bool:
        """Whether the answer may have parts other than text."""
        return self.family is not None or self.reasoning is not None


FREE = AnswerForm()
