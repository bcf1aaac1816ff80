"""Read the tools that a model may call, and whether it calls them.

They are dictionaries, like messages. What they may contain is checked by `headrace.validation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from headrace.conversation_checks import MAX_PARAMETERS, MAX_TOOLS
from headrace.gateway.api.bounded import bounded_json
from headrace.gateway.api.reading import MAX_IGNORED, invalid
from headrace.gateway.problems import Problem
from headrace.quoting import quoted
from headrace.v1 import generation_pb2 as pb

_MODES = {
    "auto": pb.TOOL_MODE_AUTO,
    "none": pb.TOOL_MODE_NONE,
    "required": pb.TOOL_MODE_REQUIRED,
}
_WANTED = (
    'must be "auto", "none", "required", {"type": "function", "function": {"name": ...}}, or '
    '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}'
)


@with_config(ConfigDict(extra="allow", strict=True))
class Function(TypedDict):
    """What a tool is called, does and takes. Arguments match the schema, whatever `strict` is."""

    name: str
    description: NotRequired[str | None]
    parameters: NotRequired[dict[str, object] | None]
    strict: NotRequired[bool | None]


@with_config(ConfigDict(extra="allow", strict=True))
class Tool(TypedDict):
    """A tool that the model may call."""

    type: NotRequired[str]
    function: NotRequired[Function]


@dataclass(frozen=True)
class Choice:
    """Whether the model calls tools.

    mode      in the mesh, unless there is a name
    name      of the tool that it calls
    allowed   the names of the tools that it may call; None: all
    """

    mode: pb.ToolMode.ValueType
    name: str | None = None
    allowed: frozenset[str] | None = None

    def allows(self, tool: Tool) -> bool:
        """Return whether the model may call *tool*."""
        return self.allowed is None or ("function" in tool and tool["function"]["name"] in self.allowed)


def choice_of(value: object) -> Choice:
    """Return what the JSON value of `tool_choice` requests. Raises Problem."""
    if isinstance(value, str) and value in _MODES:
        return Choice(_MODES[value])
    if isinstance(value, dict):
        if value.get("type") == "function" and (name := _name_in(value)) is not None:
            return Choice(pb.TOOL_MODE_REQUIRED, name=name)
        if value.get("type") == "allowed_tools" and isinstance(inner := value.get("allowed_tools"), dict):
            return _allowed(inner)
    shown = quoted(value) if isinstance(value, str) else "of another form"
    raise invalid("tool_choice", f"is {shown}, {_WANTED}")


def _allowed(value: Mapping[str, Any]) -> Choice:
    mode, tools = value.get("mode"), value.get("tools")
    if mode not in ("auto", "required"):
        raise invalid("tool_choice.allowed_tools.mode", 'must be "auto" or "required"')
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        raise invalid("tool_choice.allowed_tools.tools", f"must be a list of 1 to {MAX_TOOLS} tools")
    names = [_name_in(tool) for tool in tools]
    if None in names:
        raise invalid(
            f"tool_choice.allowed_tools.tools[{names.index(None)}]",
            'must be {"type": "function", "function": {"name": ...}}',
        )
    return Choice(_MODES[mode], allowed=frozenset(name for name in names if name is not None))


def _name_in(value: object) -> str | None:
    """Return the name in {"function": {"name": ...}}; None if there is none."""
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name else None


def set_tools(
    chat: pb.Chat, tools: Sequence[Tool], choice: Choice | None, *, parallel: bool | None, large: bool
) -> None:
    """Set the tools of a conversation, and whether they are called. Raises Problem.

    choice     None: the model decides, if there are tools
    parallel   whether one answer may contain several calls; None: by default
    large      see `bounded_json`
    """
    if not tools:
        if choice is not None and (choice.mode == pb.TOOL_MODE_REQUIRED or choice.allowed is not None):
            raise invalid("tool_choice", "is set without tools: set tools")
        return
    for place, tool in enumerate(tools):
        function = _function_of(tool, f"tools[{place}]")  # also of those that are not allowed
        if choice is None or choice.allows(tool):
            _add(chat, function, f"tools[{place}].function", large)
    if choice is not None:
        _check_names(chat, choice)
        if choice.name is None:
            chat.tool_choice.mode = choice.mode
        else:
            chat.tool_choice.name = choice.name
    if parallel is not None:
        chat.parallel_tool_calls = parallel


def _add(chat: pb.Chat, function: Function, place: str, large: bool) -> None:
    added = chat.tools.add(name=function["name"], description=function.get("description") or "")
    if (parameters := function.get("parameters")) is not None:
        added.parameters = bounded_json(parameters, f"{place}.parameters", MAX_PARAMETERS, large=large)


def _check_names(chat: pb.Chat, choice: Choice) -> None:
    names = {tool.name for tool in chat.tools}
    if choice.name is not None and choice.name not in names:
        raise invalid("tool_choice.function.name", f"is {quoted(choice.name)}, which no tool has as its name")
    if unknown := (choice.allowed or frozenset()) - names:
        raise invalid(
            "tool_choice.allowed_tools.tools", f"has {quoted(min(unknown))}, which no tool has as its name"
        )


def _function_of(tool: Tool, place: str) -> Function:
    if (kind := tool.get("type", "function")) != "function":
        raise Problem(
            400,
            f"{place}.type is {quoted(kind)}, which is not supported: send tools of type function",
            code="unsupported_parameter",
            param=f"{place}.type",
        )
    if "function" not in tool:
        raise Problem(
            400,
            f"{place}.function is missing: set its name and parameters",
            code="missing_required_parameter",
            param=f"{place}.function",
        )
    return tool["function"]


def params_of(tools: Sequence[Tool], choice: Choice | None) -> dict[str, str]:
    """Return the names in the request of fields of the contract about tools, for `problem_of`."""
    names = {
        "chat.tools[]": "tools[].function",
        "chat.tool_choice.mode": "tool_choice",
        "chat.tool_choice.name": "tool_choice.function.name",
    }
    if choice is not None and choice.allowed is not None:
        kept = [place for place, tool in enumerate(tools) if choice.allows(tool)]
        names |= {f"chat.tools[{at}]": f"tools[{place}].function" for at, place in enumerate(kept)}
    return names


def unused_of_tools(tools: Sequence[Tool]) -> list[str]:
    """Return the names of the fields of tools that are ignored, each once for all tools.

    Of more than a header has room for, only some.
    """
    names: set[str] = set()
    for tool in tools:
        for place, fields in (("tools[]", tool), ("tools[].function", tool.get("function", {}))):
            given = (name for name, value in fields.items() if value is not None)
            others = (f"{place}.{name}" for name in given if name not in _FIELDS[place])
            names.update(islice(others, MAX_IGNORED))
    return sorted(names)


_FIELDS = {"tools[]": Tool.__annotations__.keys(), "tools[].function": Function.__annotations__.keys()}
