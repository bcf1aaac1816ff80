"""How each family of models writes calls: the markup around names and arguments.

`parser` recognises these formats, and `calls` writes grammars of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from headrace.batcher.tools.families import Family
from headrace.batcher.tools.form import marker_text
from headrace.batcher.tools.shapes import Shape

TOOL_CALL, END_OF_TOOL_CALL = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS, ARGS = "[TOOL_CALLS]", "[ARGS]"
FENCE = "```"


def _heads(*before: str) -> tuple[Shape, ...]:
    """Return the shapes of calls up to the brace that opens the arguments, behind each of the texts."""
    return tuple(
        Shape(f'{text} {{ "name" : "@" , "{key}" : {{')
        for text in before
        for key in ("arguments", "parameters")
    )


@dataclass(frozen=True)
class Format:
    """The markup of one family.

    arguments   the key of the arguments, where calls are objects
    marker      begins calls wherever it occurs; empty: there is none
    special     other texts that are special tokens in some tokenizers
    starts      calls at the start of an answer, without a marker
    heads       calls after the marker
    tails       what closes a call, where calls are objects
    more        calls that follow another one
    closers     markup after calls
    """

    arguments: str = "arguments"
    marker: str = ""
    special: tuple[str, ...] = ()
    starts: tuple[Shape, ...] = ()
    heads: tuple[Shape, ...] = ()
    tails: tuple[Shape, ...] = (Shape(" }"),)
    more: tuple[Shape, ...] = ()
    closers: tuple[Shape, ...] = ()


# A call of newer models of Mistral, which is no object.
BARE_CALL = Shape(f" @{ARGS} {{")

FORMATS = {
    Family.HERMES: Format(
        marker=TOOL_CALL,
        special=(END_OF_TOOL_CALL,),
        # Qwen2.5-Coder writes its calls so, whatever its template says.
        starts=_heads("", f" {FENCE}", f" {FENCE}json"),
        heads=_heads(""),
        more=_heads(""),
        closers=(Shape(f" {END_OF_TOOL_CALL}"), Shape(f" {FENCE}")),
    ),
    Family.LLAMA3: Format(
        arguments="parameters",
        marker=PYTHON_TAG,
        starts=_heads(""),
        heads=_heads(""),
        more=_heads("", " ;"),
    ),
    Family.MISTRAL: Format(
        marker=TOOL_CALLS,
        special=(ARGS,),
        heads=(*_heads(" ["), BARE_CALL),
        # Templates show calls with their ids, which models then imitate.
        tails=(Shape(" }"), Shape(' , "id" : "@" }')),
        more=_heads(" ,"),
        closers=(Shape(" ]"),),
    ),
    Family.JSON: Format(
        starts=_heads("", " [", f" {FENCE}", f" {FENCE}json", f" {FENCE} [", f" {FENCE}json ["),
        more=_heads("", " ,", " ;"),
        closers=(Shape(" ]"), Shape(f" {FENCE}")),
    ),
}


@lru_cache(maxsize=64)  # one or two for each model
def format_of(family: Family, special: tuple[str, ...]) -> Format:
    """Return the format of a family in which `marker_text` stands for each of the *special* markers."""

    def written(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(written, value))
        text = value.template if isinstance(value, Shape) else value
        for number, name in enumerate(special):
            text = text.replace(name, marker_text(number))
        return Shape(text) if isinstance(value, Shape) else text

    plain = FORMATS[family]
    return Format(**{field.name: written(getattr(plain, field.name)) for field in fields(plain)})
