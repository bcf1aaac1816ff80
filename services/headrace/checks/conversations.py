"""Check the tools of a conversation and their calls, and read their JSON.

`validation` calls this for each conversation, on the event loop. Counts, names and sizes are always checked
there. The JSON of parameters and arguments is read there too, unless it is more than `READ_AT_ONCE`: then the
batcher finds its errors when it tokenises the conversation, off its event loop. Whether a schema can be
enforced is not known here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from headrace import errors
from headrace.quoting import clipped, quoted
from headrace.v1 import generation_pb2 as pb

MAX_TOOLS = 128
MAX_CALLS = 128  # of one message
MAX_ALL_CALLS = 4096  # of a conversation
MAX_PARAMETERS = 64 * 1024  # bytes, of one tool
MAX_ALL_PARAMETERS = 1024 * 1024  # bytes, of all tools
MAX_ARGUMENTS = 64 * 1024  # bytes, of one call
MAX_CALL_ID = 128
MAX_AUTHOR = 64
MAX_DEPTH = 64  # of lists and objects in each other
READ_AT_ONCE = 32 * 1024  # bytes of JSON that are read on the event loop, in 4 ms at most
_READING = 128  # bytes of JSON that take as long as reading nothing

_NAME = re.compile(r"[a-zA-Z0-9_.\-]{1,64}", re.ASCII)
_WITHOUT_TOOLS = (None, pb.TOOL_MODE_UNSPECIFIED, pb.TOOL_MODE_NONE)


class ToolChecks:
    """Checks one conversation: its tools at once, and then its messages in their order.

    Raises InvalidRequest for the first invalid field.
    """

    def __init__(self, chat: pb.Chat) -> None:
        self._ids: set[str] = set()
        self._calls = 0
        self._bytes = 0
        self._unread: list[Callable[[], object]] = []
        names = self._check_tools(chat) if chat.tools else frozenset()
        if chat.HasField("tool_choice"):
            _check_choice(chat.tool_choice, names)

    def message(self, place: int, message: pb.Message, role: str) -> None:
        """Check a message's calls, and the fields that only some roles may set."""
        if message.tool_calls:
            self._check_calls(place, message, role)
        if role != "assistant" and message.reasoning:
            raise _wrong_role(f"chat.messages[{place}].reasoning", role, "assistant")
        if id := message.tool_call_id:
            field = f"chat.messages[{place}].tool_call_id"
            if role != "tool":
                raise _wrong_role(field, role, "tool")
            if id not in self._ids:
                raise _invalid(
                    f"{field} is {quoted(id)}, which is the id of no earlier call: send the assistant's "
                    "message with the call before its result, or leave the id out",
                    field,
                )
        if message.name:
            _check_length(f"chat.messages[{place}].name", message.name, MAX_AUTHOR)

    def finish(self) -> None:
        """Read the JSON of all tools and calls, if it is not too much for the event loop."""
        if self._bytes <= READ_AT_ONCE:
            for read in self._unread:
                read()

    def _check_tools(self, chat: pb.Chat) -> frozenset[str]:
        tools = chat.tools
        if len(tools) > MAX_TOOLS:
            raise _invalid(f"chat.tools has {len(tools)} tools, must be at most {MAX_TOOLS}", "chat.tools")
        names: set[str] = set()
        for place, tool in enumerate(tools):
            field = f"chat.tools[{place}]"
            if not _NAME.fullmatch(name := tool.name):
                raise _bad_name(f"{field}.name", name)
            if name in names:
                raise _invalid(
                    f"{field}.name is {name!r}, as of an earlier tool: each needs a name of its own",
                    f"{field}.name",
                )
            names.add(name)
            if (size := _bytes(tool.parameters)) > MAX_PARAMETERS:
                raise _too_large(f"{field}.parameters", size, MAX_PARAMETERS)
            self._bytes += size
            if self._bytes > MAX_ALL_PARAMETERS:
                raise _invalid(
                    f"the parameters of chat.tools[0] to [{place}] have {self._bytes} bytes together, those "
                    f"of all tools must have at most {MAX_ALL_PARAMETERS}: send fewer tools",
                    "chat.tools",
                )
            self._unread.append(partial(parameters_of_tool, tool, place))
        return frozenset(names)

    def _check_calls(self, place: int, message: pb.Message, role: str) -> None:
        calls = message.tool_calls
        field = f"chat.messages[{place}].tool_calls"
        if role != "assistant":
            raise _wrong_role(field, role, "assistant")
        if len(calls) > MAX_CALLS:
            raise _invalid(f"{field} has {len(calls)} calls, must be at most {MAX_CALLS}", field)
        self._calls += len(calls)
        if self._calls > MAX_ALL_CALLS:
            raise _invalid(
                f"{field} and the messages before it have {self._calls} calls, must be at most "
                f"{MAX_ALL_CALLS}: remove the oldest messages",
                field,
            )
        for number, call in enumerate(calls):
            if not _NAME.fullmatch(name := call.name):
                raise _bad_name(f"{field}[{number}].name", name)
            if id := call.id:
                if len(id) > MAX_CALL_ID:
                    _check_length(f"{field}[{number}].id", id, MAX_CALL_ID)
                self._ids.add(id)
            if not (text := call.arguments):
                continue
            if (size := _bytes(text)) > MAX_ARGUMENTS:
                raise _too_large(f"{field}[{number}].arguments", size, MAX_ARGUMENTS)
            self._bytes += _READING + size
            self._unread.append(partial(arguments_of_call, call, place, number))


def parameters_of_tool(tool: pb.Tool, place: int) -> dict[str, Any]:
    """Return the JSON schema of a tool's arguments. Raises InvalidRequest.

    place   the tool's, in `chat.tools`
    """
    if not tool.parameters:
        return {"type": "object", "properties": {}}
    field = f"chat.tools[{place}].parameters"
    schema = _object(tool.parameters, field)
    if (kind := schema.get("type", "object")) != "object":
        raise _invalid(
            f"{field} has the type {clipped(json.dumps(kind), 64)}, "
            'must be "object": arguments are an object',
            field,
        )
    return schema


def arguments_of_call(call: pb.ToolCall, place: int, number: int) -> dict[str, Any]:
    """Return the arguments of a call. Raises InvalidRequest.

    place    of the message in `chat.messages`
    number   of the call in the message
    """
    if not call.arguments:
        return {}
    return _object(call.arguments, f"chat.messages[{place}].tool_calls[{number}].arguments")


def _object(text: str, field: str) -> dict[str, Any]:
    """Return a JSON object with a bounded depth, so that recursive code can walk it."""
    try:
        read = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise _too_deep(field) from None
    except json.JSONDecodeError as error:
        raise _invalid(f"{field} is not JSON: {error.msg} at character {error.pos}", field) from None
    except ValueError as error:  # a number that JSON does not have, or with thousands of digits
        raise _invalid(f"{field} is not JSON: {error}", field) from None
    if not isinstance(read, dict):
        raise _invalid(f"{field} is JSON, but not an object", field)
    inner: list[Any] = [read]
    for _ in range(MAX_DEPTH):
        inner = [
            each
            for outer in inner
            for each in (outer.values() if type(outer) is dict else outer)
            if type(each) is dict or type(each) is list
        ]
        if not inner:
            return read
    raise _too_deep(field)


def _check_choice(choice: pb.ToolChoice, names: frozenset[str]) -> None:
    kind, field = choice.WhichOneof("choice"), "chat.tool_choice"
    if kind is None:
        raise _invalid(f"{field} is empty: set mode or name, or leave it out", field)
    if kind == "mode" and choice.mode not in pb.ToolMode.values():
        raise _invalid(f"{field}.mode is {choice.mode}, which is no mode: use a value of ToolMode", field)
    if not names and (kind == "name" or choice.mode not in _WITHOUT_TOOLS):
        raise _invalid(f"{field} is set, but chat.tools is empty: add the tools, or leave it out", field)
    if kind == "name" and choice.name not in names:
        raise _invalid(
            f"{field}.name is {quoted(choice.name)}, which is the name of no tool in chat.tools", field
        )


def _check_length(field: str, text: str, most: int) -> None:
    if len(text) > most:
        raise _invalid(f"{field} has {len(text)} characters, must be at most {most}", field)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _bad_name(field: str, name: str) -> errors.InvalidRequest:
    return _invalid(
        f"{field} is {quoted(name)}, must be 1 to 64 letters (a to z), digits, '_', '-' and '.'", field
    )


def _too_large(field: str, size: int, most: int) -> errors.InvalidRequest:
    return _invalid(f"{field} has {size} bytes, must be at most {most}", field)


def _wrong_role(field: str, role: str, needed: str) -> errors.InvalidRequest:
    return _invalid(f"{field} is set, but the message has role {role!r}: only {needed!r} may set it", field)


def _too_deep(field: str) -> errors.InvalidRequest:
    return _invalid(f"{field} has more than {MAX_DEPTH} lists and objects in each other", field)


def _invalid(message: str, field: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(message, field=field)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name}, which is not a JSON number")
