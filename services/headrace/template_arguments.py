"""Check variables for chat templates, and read them as plain values.

Routers and batchers check those of a request, and a batcher those of its settings. `batcher.text.templates`
passes them to a template. This module does not know what a template does with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias

from google.protobuf import struct_pb2

from headrace import errors
from headrace.quoting import quoted

Arguments: TypeAlias = Mapping[str, Any]  # names, and values as JSON has them

NO_ARGUMENTS: Arguments = MappingProxyType({})
FIELD = "chat.template_arguments"
MAX_BYTES = 16 * 1024  # of the message
MAX_DEPTH = 16  # of lists and objects in each other; the arguments themselves are the first
_NO_OBJECT = 'it is not a JSON object such as {"enable_thinking": false}'
_EXACT = 2.0**53  # up to here, each integer has a double of its own

# What the server passes to a template itself, and the functions that templates call.
RESERVED = frozenset(
    {
        *("messages", "conversation", "conversations", "add_generation_prompt", "continue_final_message"),
        *("tools", "documents", "chat_template", "return_assistant_tokens_mask", "self"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
        *("additional_special_tokens", "raise_exception", "strftime_now", "dict", "namespace", "range"),
        *("cycler", "joiner", "lipsum"),
    }
)


def check_arguments(arguments: struct_pb2.Struct, field: str = FIELD) -> None:
    """Raise InvalidRequest unless *arguments* are variables that a caller may set, within the bounds."""
    size = arguments.ByteSize()
    if size > MAX_BYTES:
        raise _invalid(f"{field} has {size} bytes, must be at most {MAX_BYTES}", field)
    for name, value in arguments.fields.items():
        if name in RESERVED:
            raise _invalid(f"{field} sets {name!r}, which the server sets itself: leave it out", field)
        if not name.isidentifier():
            raise _invalid(
                f"{field} has the name {quoted(name)}, which no template can read: names consist of letters, "
                "digits and underscores, and do not begin with a digit",
                field,
            )
        _check_value(value, f"{field}.{quoted(name)}", field, depth=1)


def arguments_of(arguments: struct_pb2.Struct) -> dict[str, Any]:
    """Return checked arguments as plain values, each object with its names in order of code points.

    A Struct has doubles only, so whole numbers become integers. Its maps have another order in each process:
    without an order of our own, two batchers could render different prompts for one request.
    """
    return {name: _plain(arguments.fields[name]) for name in sorted(arguments.fields)}


def read_arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a setting, a JSON object, as `arguments_of` returns them; empty for an
    empty text.

    Raises ValueError, with a message without the text.
    """
    if not text.strip():
        return {}
    try:
        read = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it has too many lists and objects in each other") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{_NO_OBJECT}: {error.msg} at character {error.pos}") from None
    if not isinstance(read, dict):
        raise ValueError(_NO_OBJECT)
    struct = struct_pb2.Struct()
    try:
        struct.update(read)
        check_arguments(struct, "it")
    except (RecursionError, OverflowError):
        raise ValueError("it has a value that is too deep or too large") from None
    except errors.InvalidRequest as error:
        raise ValueError(error.message) from None
    return arguments_of(struct)


def texts_in(arguments: Arguments) -> Iterator[str]:
    """Yield each text in the values, and each name inside of them."""
    for value in arguments.values():
        yield from _texts(value)


def with_texts(arguments: Arguments, change: Callable[[str], str]) -> Arguments:
    """Return the arguments with each of their `texts_in` changed."""
    return {name: _changed(value, change) for name, value in arguments.items()}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        yield from texts_in(value)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _changed(each, change) for name, each in value.items()}
    return [_changed(each, change) for each in value] if isinstance(value, list) else value


def _check_value(value: struct_pb2.Value, name: str, field: str, depth: int) -> None:
    kind = value.WhichOneof("kind")
    if kind is None:
        raise _invalid(f"{name} has a value of no kind: set one, such as null_value", field)
    if kind == "number_value" and not math.isfinite(value.number_value):
        raise _invalid(f"{name} is {value.number_value:g}, which is not a JSON number", field)
    if kind not in ("struct_value", "list_value"):
        return
    if depth >= MAX_DEPTH:
        raise _invalid(f"{name} has more than {MAX_DEPTH} lists and objects in each other", field)
    inner = value.struct_value.fields.values() if kind == "struct_value" else value.list_value.values
    for each in inner:
        _check_value(each, name, field, depth + 1)


def _plain(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() and abs(number) <= _EXACT else number
    if kind == "struct_value":
        return arguments_of(value.struct_value)
    if kind == "list_value":
        return [_plain(each) for each in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)


def _invalid(message: str, field: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(message, field=field)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name}, which is not a JSON number")
