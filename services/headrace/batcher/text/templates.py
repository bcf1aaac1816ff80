"""Render chats with a model's chat template, which is tested when it is loaded.

The template runs in a separate process (`renderer`). Templates differ in what they accept: some expect the
content of a message as text, some as a list of parts, and some support no system messages. The arguments of a
call are an object for most and JSON for some. Many know no tools at all: `tools.instructions` puts these into
ordinary messages. A message that a template drops without an error would be lost silently, so each new
sequence of roles is first tried with markers for contents, calls and tools, and again with each new set of
arguments. This module does not know tokens; `tokens` turns the rendered text into ids.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Any

from headrace import errors
from headrace.batcher.text.renderer import Renderer, TemplateFailed, TemplateRefused
from headrace.batcher.tools.families import Family, family_of
from headrace.batcher.tools.instructions import TOOLS_PLACE, Placed, as_text
from headrace.batcher.turns import Call, Tool, Tools, Turn, Turns, dumped, named_results
from headrace.template_arguments import FIELD, NO_ARGUMENTS, Arguments

_PARTS = "parts"
_TEXT = "text"
_TRIALS: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("user", "assistant", "tool"),
)
log = logging.getLogger(__name__)

_MARKER = re.compile(r"7\d{6}3")
_JSON_ARGUMENT = re.compile(r'"arg":\s*"7\d{6}3"')
_MAX_REMEMBERED = 256  # sequences of roles, with arguments of up to 16 KiB
_INSTEAD = "send `prompt` instead of `chat`, or give the model another template"
_TRIAL_ID = "callnum01"  # some templates require nine letters and digits
_NINE = re.compile("[0-9A-Za-z]{9}")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a template's decision to drop a message may depend on.

    text     whether it has a content
    calls    how many calls it has
    linked   whether it names the call that it is the result of
    """

    role: str
    text: bool = True
    calls: int = 0
    linked: bool = False

    @classmethod
    def of(cls, turn: Turn) -> _Shape:
        calls = len(turn.tool_calls)
        return cls(turn.role, bool(turn.content) or not calls, calls, bool(turn.tool_call_id))


@dataclass(frozen=True, slots=True)
class _CallForm:
    """How a template expects a message with calls.

    as_json   the arguments are JSON, not an object
    no_text   the content of a message without one
    apart     a content precedes the calls in a message of its own: otherwise it is dropped
    """

    as_json: bool
    no_text: str | None
    apart: bool = False


_CALL_FORMS = tuple(_CallForm(as_json, no_text) for as_json in (False, True) for no_text in ("", None))
_CALLED = (_Shape("user"), _Shape("assistant", text=False, calls=1), _Shape("tool", linked=True))
_TEXT_AND_CALL = (_CALLED[0], _Shape("assistant", calls=1), _CALLED[2])
_APART = (_CALLED[0], _Shape("assistant"), *_CALLED[1:], _Shape("assistant"), _Shape("user"))


class ChatTemplate:
    """A template, and the form in which it expects the content of each role.

    source    the template's text
    frame     the text that it wrote in trials
    problem   why it renders no chat at all; empty if it works
    family    the format in which the model writes calls of tools: JSON if the template does not render tools

    The last argument is the family; None: as the template writes calls.
    """

    def __init__(self, source: str, tokens: Mapping[str, Any], family: Family | None = None) -> None:
        self._renderer = Renderer(source, tokens)
        self._forms: dict[str, str] = {}
        self._accepted: set[str] = set()  # roles
        self._call_form = _CALL_FORMS[0]
        self._tokens = frozenset(tokens)
        self.source = source
        self.frame = ""
        self.problem = ""
        self.family = Family.JSON
        for roles in _TRIALS:
            if not self.problem:
                self._choose_form(roles)
        if not self.problem and (wanted := family or family_of(source)) is not Family.JSON:
            self._choose_call_form(wanted)
        self._dropped = lru_cache(_MAX_REMEMBERED)(self._try)

    def render(
        self,
        turns: Turns,
        *,
        tools: Tools = (),
        add_generation_prompt: bool = True,
        arguments: Arguments = NO_ARGUMENTS,
    ) -> str:
        """Return the text of *turns*, by default with the start of the answer.

        tools       the tools that the model may call
        arguments   see `Renderer.render`

        Raises InvalidRequest if the template refuses the turns, fails on them, or drops one or the tools.
        """
        if self.problem:
            raise errors.InvalidRequest(
                f"the model's chat template does not work: {self.problem}; {_INSTEAD}", field="chat"
            )
        if tokens := self._tokens & arguments.keys():
            raise errors.InvalidRequest(
                f"{FIELD} sets {min(tokens)!r}, which is a special token of the model: leave it out",
                field=FIELD,
            )
        given = "these messages and template arguments" if arguments else "these messages"
        placed, shown = self._placed(turns, tools)
        try:
            text = self._render(placed, shown, arguments, add_generation_prompt=add_generation_prompt)
        except TemplateRefused as error:
            raise errors.InvalidRequest(
                f"the model's chat template refuses {given}: {error}", field="chat.messages"
            ) from error
        except TemplateFailed as error:
            raise errors.InvalidRequest(
                f"the model's chat template fails on {given}: {error}; {_INSTEAD}", field="chat.messages"
            ) from error
        shapes = tuple(_Shape.of(turn) for _, turn in placed)
        at = self._dropped(shapes, bool(shown), json.dumps(dict(arguments), sort_keys=True))
        if at is not None:
            raise _dropped_error(TOOLS_PLACE if at == TOOLS_PLACE else placed[at][0], turns)
        return text

    def completed(self, turns: Turns) -> Turns:
        """Return the turns with what templates require: results name their tool, Mistral's ids are short."""
        turns = named_results(turns)
        if self.family is not Family.MISTRAL:
            return turns
        return [
            replace(
                turn,
                tool_call_id=_nine(turn.tool_call_id),
                tool_calls=tuple(replace(call, id=_nine(call.id)) for call in turn.tool_calls),
            )
            for turn in turns
        ]

    def _placed(self, turns: Turns, tools: Tools) -> tuple[list[Placed], Tools]:
        """Return the turns and the tools as the template receives them."""
        if self.family is Family.JSON:
            if not tools and not any(turn.tool_calls for turn in turns):
                return list(enumerate(turns)), ()
            return as_text(turns, tools, system="system" in self._accepted), ()
        if not self._call_form.apart:
            return list(enumerate(turns)), tools
        return [(place, part) for place, turn in enumerate(turns) for part in _apart(turn)], tools

    def _choose_form(self, roles: tuple[str, ...]) -> None:
        """Determine in which form the role that is new in *roles* expects its content."""
        new = next(role for role in roles if role not in self._forms)
        problem = ""
        for form in (_TEXT, _PARTS):
            self._forms[new] = form
            try:
                text, place = self._render_markers(tuple(map(_Shape, roles)))
                if place is None:
                    self.frame += text
                    self._accepted.add(new)
                    return
                problem = problem or f"it drops the message of role {roles[place]!r}"
            except (TemplateRefused, TemplateFailed) as error:
                problem = problem or str(error)
        self._forms[new] = self._forms.get("user", _TEXT)
        if roles == ("user",):
            self.problem = problem

    def _choose_call_form(self, family: Family) -> None:
        """Determine how the template expects calls. The family stays JSON if it renders no tools or calls."""
        problem = ""
        for form in _CALL_FORMS:
            self._call_form = form
            try:
                text, place = self._render_markers(_CALLED, tools=True)
            except (TemplateRefused, TemplateFailed) as error:
                problem = problem or str(error)
                continue
            # Other forms are Python's, or tags of XML, in which no `Family` is written.
            if place is None and _JSON_ARGUMENT.search(text):
                self.family = family
                self.frame += text
                break
            problem = problem or "it drops the tools, a call or its result, or writes a call in another form"
        else:
            self._call_form = _CALL_FORMS[0]
            log.warning(
                "chat template does not render tools", extra={"family": family.value, "problem": problem}
            )
            return
        if self._renders(_TEXT_AND_CALL) is False and self._renders(_APART):
            self._call_form = replace(self._call_form, apart=True)

    def _renders(self, shapes: tuple[_Shape, ...]) -> bool | None:
        """Return whether the template shows all of such a chat with tools; None: it refuses it."""
        try:
            return self._render_markers(shapes, tools=True)[1] is None
        except (TemplateRefused, TemplateFailed):
            return None

    def _try(self, shapes: tuple[_Shape, ...], tools: bool, arguments: str) -> int | None:
        """Return the place of a message that is dropped, `TOOLS_PLACE` for tools; *arguments* are JSON."""
        try:
            return self._render_markers(shapes, json.loads(arguments), tools=tools)[1]
        except (TemplateRefused, TemplateFailed):
            return None  # real messages of these roles raise the same error

    def _render_markers(
        self, shapes: Sequence[_Shape], arguments: Arguments = NO_ARGUMENTS, *, tools: bool = False
    ) -> tuple[str, int | None]:
        """Render markers as contents, arguments of calls, and names of tools.

        Returns the text, and the place of the first message missing in it.
        """
        places: dict[str, int] = {}
        numbers = count()

        def marker(place: int) -> str:
            places[made := f"7{next(numbers):06d}3"] = place
            return made

        turns = [
            Turn(
                shape.role,
                marker(place) if shape.text else "",
                "lookup" if shape.linked else "",
                _TRIAL_ID if shape.linked else "",
                tuple(Call("lookup", {"arg": marker(place)}, _TRIAL_ID) for _ in range(shape.calls)),
            )
            for place, shape in enumerate(shapes)
        ]
        shown = [_trial_tool(marker(TOOLS_PLACE), marker(TOOLS_PLACE))] if tools else []
        text = self._render(list(enumerate(turns)), shown, arguments, add_generation_prompt=True)
        found = set(_MARKER.findall(text))
        return text, next((place for made, place in places.items() if made not in found), None)

    def _render(
        self, placed: Sequence[Placed], tools: Tools, arguments: Arguments, *, add_generation_prompt: bool
    ) -> str:
        return self._renderer.render(
            [self._message(turn) for _, turn in placed],
            tools=[{"type": "function", "function": tool.function} for tool in tools] or None,
            add_generation_prompt=add_generation_prompt,
            arguments=arguments,
        )

    def _message(self, turn: Turn) -> dict[str, Any]:
        """Return the turn as templates expect a message; fields without a value are left out."""
        content: Any = turn.content
        if turn.tool_calls and not content:
            content = self._call_form.no_text
        elif self._forms.get(turn.role, _TEXT) == _PARTS:
            content = [{"type": "text", "text": content}]
        message = {
            "role": turn.role,
            "content": content,
            "name": turn.name,
            "tool_call_id": turn.tool_call_id,
            "reasoning_content": turn.reasoning,
            "tool_calls": [self._call(call) for call in turn.tool_calls],
        }
        return {name: value for name, value in message.items() if value or name == "content"}

    def _call(self, call: Call) -> dict[str, Any]:
        arguments: Any = dumped(call.arguments) if self._call_form.as_json else dict(call.arguments)
        made = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
        return {"id": call.id, **made} if call.id else made


def choose_template(
    templates: Mapping[str, str], tokens: Mapping[str, Any], family: Family | None = None
) -> ChatTemplate | None:
    """Return the template for chats: the one called "default", or otherwise the first that works.

    templates   by name, in the order of the model's file
    tokens      see `Renderer`
    family      see `ChatTemplate`

    A template that does not work is logged, and returned if there is no other. Returns None without
    templates.
    """
    names = ["default"] if "default" in templates else list(templates)
    chosen = None
    for name in names:
        template = ChatTemplate(templates[name], tokens, family)
        if not template.problem:
            return template
        log.warning("chat template does not work", extra={"template": name, "problem": template.problem})
        chosen = chosen or template
    return chosen


def _apart(turn: Turn) -> Iterator[Turn]:
    """Yield a turn, or its content and its calls one by one if it has both."""
    if not (turn.content and turn.tool_calls):
        yield turn
        return
    yield replace(turn, tool_calls=())
    yield replace(turn, content="", reasoning="")


def _trial_tool(name: str, parameter: str) -> Tool:
    parameters = {"type": "object", "properties": {f"arg_{parameter}": {"type": "string"}}}
    return Tool(f"tool_{name}", "Looks it up.", parameters)


def _nine(id: str) -> str:
    """Return nine letters and digits for an id: itself, or some that are the same for equal ids."""
    if not id or _NINE.fullmatch(id):
        return id
    number = int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big")
    return "".join(_DIGITS[number // 36**power % 36] for power in range(9))


def _dropped_error(place: int, turns: Turns) -> errors.InvalidRequest:
    if place == TOOLS_PLACE:
        return errors.InvalidRequest(
            "the model's chat template drops chat.tools with these messages: leave them out, or set "
            "--tool-format json at its batchers",
            field="chat.tools",
        )
    turn = turns[place]
    if turn.tool_calls:
        return errors.InvalidRequest(
            f"the model's chat template drops the content or a call of chat.messages[{place}]: leave its "
            "content out, or send its calls in messages of their own",
            field=f"chat.messages[{place}]",
        )
    return errors.InvalidRequest(
        f"the model's chat template drops chat.messages[{place}], of role {turn.role!r}: it supports no "
        "such message there; put its text into another message",
        field=f"chat.messages[{place}]",
    )
