"""Write grammars of answers: calls of tools in the format of a family, among text, after thoughts.

A grammar is in llguidance's Lark. Where the answer is free text, everything but special tokens stays allowed
until a call begins, exactly where `parser` would recognise one; from there on, the call is valid. A lazy
terminal ends where it first matches, even if another one could go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.batcher.tools.families import Family
from headrace.batcher.tools.formats import ARGS, END_OF_TOOL_CALL, FENCE, FORMATS
from headrace.batcher.tools.shapes import SPACE, escaped
from headrace.grammars.forms import Part, literal, to_text

_ANY = r"(.|\n)"
_FEW = r"[ \n]{0,4}"  # white space that models write around calls
# Terminals between calls of families that do not write one of several lines.
_SEPARATORS = {
    Family.LLAMA3: r"/;[ \n]?|\n/",
    Family.MISTRAL: "/, /",
    Family.JSON: r"/[,;][ \n]?|\n/",
}


@dataclass(frozen=True)
class Calls:
    """The calls that an answer may contain.

    family    how they are written
    tools     names of the tools and grammars of their arguments, at least one
    required  whether the answer consists of calls; otherwise it may also be text, or have its form
    several   whether there may be more than one
    """

    family: Family
    tools: Sequence[tuple[str, Part]]
    required: bool = False
    several: bool = True


@dataclass(frozen=True)
class Thoughts:
    """What a model thinks first.

    markers   the texts before and after
    opened    whether the prompt ends with the first marker; otherwise there may be none
    """

    markers: tuple[str, str]
    opened: bool = False


def answer_grammar(
    form: Part | None, calls: Calls | None, thoughts: Thoughts | None, specials: Mapping[str, int]
) -> str:
    """Return the grammar of an answer, in llguidance's format; empty: it may be any text.

    form       what the answer is if it is no call; None: any text
    calls      None: there are none
    thoughts   None: there are none
    specials   ids of the special tokens by name; markers among them are written as these tokens
    """
    if calls is None and (form is None or thoughts is None):
        return "" if form is None else form.text
    rules = _Rules(specials)
    free = False
    if form is not None:
        rules.parts["form"] = form
    if calls is None:
        rules.add("body", "@form")
    else:
        rules.add_calls(calls)
        free = form is None and not calls.required
        if free:
            rules.add_free_text(calls)
        else:
            rules.add("body", "@form | calls" if form is not None and not calls.required else "calls")
    if thoughts is None:
        rules.add("start", "body")
    else:
        rules.add_thoughts(thoughts, may_remain_open=free)
    return to_text("\n".join(rules.lines), rules.parts)


# Calls of these have an end of their own, so that text after them is no part of a call.
_TEXT_AFTER_CALLS = (Family.HERMES, Family.MISTRAL)


class _Rules:
    """The rules of a grammar, and the grammars that they refer to as `@name`."""

    def __init__(self, specials: Mapping[str, int]) -> None:
        self._specials = specials
        self.lines: list[str] = []
        self.parts: dict[str, Part] = {}
        self.add("ANY", f"/{_ANY}+/")

    def add(self, name: str, expression: str) -> None:
        """Add a rule, or a terminal if the name is in capitals."""
        self.lines.append(f"{name}: {expression}")

    def marker(self, text: str) -> str:
        """Return the expression for a marker."""
        return f"<[{self._specials[text]}]>" if text in self._specials else literal(text)

    def add_up_to(self, name: str, marker: str) -> None:
        """Add a rule for any text up to the end of a marker."""
        if marker in self._specials:
            self.add(name, f"ANY? {self.marker(marker)}")
        else:
            self.add(f"{name}[lazy]", f"/{_ANY}*{escaped(marker)}/")

    def add_calls(self, calls: Calls) -> None:
        """Add the rules `calls`, and `after_marker`: a call or several without the first marker."""
        style = FORMATS[calls.family]
        first = self.marker(style.marker) if style.marker else ""
        for place, (_, arguments) in enumerate(calls.tools):
            self.parts[f"arguments_{place}"] = arguments
        # In JSON, each of these literals is one of the grammar's tokens: so a form can begin as a call does.
        objects = " | ".join(
            f"{literal(_quoted(name))} {_member(style.arguments, place)}"
            for place, (name, _) in enumerate(calls.tools)
        )
        self.add("object", f'"{{" {literal(_quoted("name"))} ": " ({objects}) "}}"')
        self.add("SEPARATOR", _SEPARATORS.get(calls.family, r"/\n/"))
        match calls.family:
            case Family.HERMES:
                one = f'"\\n" object "\\n" {self.marker(END_OF_TOOL_CALL)}'
                more = f"(SEPARATOR {first} one)*"
            case Family.MISTRAL if ARGS in self._specials:
                one = " | ".join(
                    f"{literal(name)} {self.marker(ARGS)} @arguments_{place}"
                    for place, (name, _) in enumerate(calls.tools)
                )
                more = f"({first} one)*"
            case Family.MISTRAL:
                one = f'" "? "[" object {"(SEPARATOR object)*" if calls.several else ""} "]"'
                more = ""
            case Family.LLAMA3 | Family.JSON:
                one, more = "object", "(SEPARATOR object)*"
                first = f"{first}?" if style.marker in self._specials else ""
        self.add("one", one)
        self.add("after_marker", f"one {more if calls.several else ''}")
        self.add("calls", f"{first} after_marker")

    def add_free_text(self, calls: Calls) -> None:
        """Add the rule `body`: text or calls, as they come."""
        style = FORMATS[calls.family]
        ends = ["ANY?"]
        if style.starts:
            heads = "|".join(dict.fromkeys(shape.pattern for shape in style.starts))
            for place, (name, _) in enumerate(calls.tools):
                # Any white space: after thoughts, all of it is dropped before the call.
                self.add(f"head_{place}[lazy]", f'/[ \\t\\r\\n]*({heads}){escaped(name)}"/')
            first = " | ".join(
                f"head_{place} {_member(style.arguments, place)}" for place in range(len(calls.tools))
            )
            more = "(SEPARATOR object)*" if calls.several else ""
            self.add("CLOSER", rf"/{_FEW}(\]|{FENCE}|\]{_FEW}{FENCE}){_FEW}/")
            ends.append(f'({first}) "}}" {more} {"CLOSER?" if style.closers else ""}')
        ways = ends
        if style.marker:
            self.add_up_to("up_to_call", style.marker)
            if calls.several and calls.family in _TEXT_AFTER_CALLS:
                ways = [f"(up_to_call after_marker)* ({' | '.join(ends)})"]
            else:
                ways = ["up_to_call after_marker", *ends]
        self.add("body", " | ".join(ways))

    def add_thoughts(self, thoughts: Thoughts, *, may_remain_open: bool) -> None:
        """Add the rule `start`: the thoughts, then `body`.

        may_remain_open   whether the answer may end within the thoughts
        """
        opener, closer = thoughts.markers
        self.add_up_to("up_to_closer", closer)
        self.add("SPACE", f"/{_FEW}[ \\n]/")
        thought = "up_to_closer body" if may_remain_open else "up_to_closer SPACE? body"
        if may_remain_open:
            thought += " | ANY?"
        if thoughts.opened:
            self.add("start", thought)
            return
        if opener in self._specials:
            self.add("opener", f"SPACE? {self.marker(opener)}")
        else:
            self.add("opener[lazy]", f"/{SPACE}{escaped(opener)}/")
        self.add("start", f"body | opener ({thought})")


def _member(key: str, place: int) -> str:
    """Return the expression for the arguments of the tool at *place*, with their key."""
    return f'", " {literal(_quoted(key))} ": " @arguments_{place}'


def _quoted(text: str) -> str:
    return f'"{text}"'
