"""The form of one answer: what its tokens may be, and how its text is split into parts."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.batcher.tools.families import Family


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What `tools.forms` makes of a request and its prompt.

    grammar    in llguidance's format; empty: any tokens
    family     how calls in the answer are written; None: it has none, and all its text is text
    reasoning  the markers of what the model thinks first, such as ("<think>", "</think>"); None: no such
    thinking   whether the prompt has opened the first marker, so that the answer begins with thoughts
    """

    grammar: str = ""
    family: Family | None = None
    reasoning: tuple[str, str] | None = None
    thinking: bool = False


FREE = AnswerForm()
