"""The messages of a chat completion: their parts, the text of each, and the calls of tools.

They are dictionaries: objects of classes take ten times as long, and a conversation may have thousands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from headrace.conversation_checks import MAX_ARGUMENTS, MAX_CALLS
from headrace.gateway.api.reading import Refusal, unused_of
from headrace.gateway.problems import Problem
from headrace.quoting import quoted
from headrace.v1 import generation_pb2 as pb

MAX_PARTS = 4096  # of a message

_TEXT_ONLY = "the models of this server read text only: send parts of type text"
_MEDIA = ("image_url", "input_audio", "file", "video_url", "audio_url")
REFUSED: Mapping[str, Refusal] = {
    "audio": Refusal(_TEXT_ONLY),
    "function_call": Refusal("use tool_calls"),
}
# Names in a request for fields of the contract, for `problem_of`.
MESSAGE_PARAMS: Mapping[str, str] = {
    "chat.messages[].tool_calls[].name": "messages[].tool_calls[].function.name",
    "chat.messages[].tool_calls[].arguments": "messages[].tool_calls[].function.arguments",
}


@with_config(ConfigDict(extra="allow", strict=True))
class Part(TypedDict):
    """A part of the content of a message."""

    type: str
    text: NotRequired[str | None]
    refusal: NotRequired[str | None]


@with_config(ConfigDict(extra="allow", strict=True))
class CalledFunction(TypedDict):
    """What a call calls; the arguments are JSON."""

    name: str
    arguments: NotRequired[Annotated[str, Field(max_length=MAX_ARGUMENTS)] | None]


@with_config(ConfigDict(extra="allow", strict=True))
class Call(TypedDict):
    """A call of a tool."""

    id: str
    type: NotRequired[str | None]
    function: NotRequired[CalledFunction]


@with_config(ConfigDict(extra="allow", strict=True))
class Message(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: NotRequired[str | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)] | None]
    name: NotRequired[str | None]
    refusal: NotRequired[str | None]
    tool_call_id: NotRequired[str | None]
    tool_calls: NotRequired[Annotated[list[Call], Field(max_length=MAX_CALLS, fail_fast=True)] | None]
    # vLLM's, which called it reasoning_content before
    reasoning: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]


_PART_FIELDS = Part.__annotations__.keys()
_MESSAGE_FIELDS = Message.__annotations__.keys()


def add_message(chat: pb.Chat, message: Message, place: str) -> None:
    """Append a message to a conversation. Raises Problem.

    place   of the message in the request, such as "messages[3]"
    """
    reasoning = message.get("reasoning")
    added = chat.messages.add(
        role=message["role"],
        content=words_of(message, place),
        name=message.get("name") or "",
        tool_call_id=message.get("tool_call_id") or "",
        reasoning=message.get("reasoning_content") if reasoning is None else reasoning,
    )
    for number, call in enumerate(message.get("tool_calls") or ()):
        function = _function_of(call, f"{place}.tool_calls[{number}]")
        added.tool_calls.add(id=call["id"], name=function["name"], arguments=function.get("arguments") or "")


def _function_of(call: Call, place: str) -> CalledFunction:
    if (kind := call.get("type")) not in ("function", None):
        raise Problem(
            400,
            f"{place}.type is {quoted(kind)}, which is not supported: tools have type function",
            code="unsupported_content",
            param=f"{place}.type",
        )
    if "function" not in call:
        raise Problem(
            400,
            f"{place}.function is missing: set its name and arguments",
            code="missing_required_parameter",
            param=f"{place}.function",
        )
    return call["function"]


def words_of(message: Message, place: str) -> str:
    """Return the text of a message. Raises Problem for a part without text.

    Parts are joined by line breaks, as in vLLM. What the assistant refused with is what it said.

    place   of the message, such as "messages[3]"
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        return message.get("refusal") or ""
    return "\n".join(_words_of_part(part, f"{place}.content[{at}]") for at, part in enumerate(content))


def _words_of_part(part: Part, place: str) -> str:
    kind = part["type"]
    if kind not in ("text", "refusal"):
        advice = _TEXT_ONLY if kind in _MEDIA else "send parts of type text"
        raise Problem(
            400,
            f"{place}.type is {quoted(kind)}, which is not supported: {advice}",
            code="unsupported_content",
            param=f"{place}.type",
        )
    text = part.get("text") if kind == "text" else part.get("refusal")
    if text is None:
        raise Problem(
            400,
            f"{place}.{kind} is missing: set the text of the part",
            code="missing_required_parameter",
            param=f"{place}.{kind}",
        )
    return text


def unused_of_messages(messages: Sequence[Message]) -> list[str]:
    """Return the names of the fields of messages that are ignored. Raises Problem for one that is refused.

    A name is given once for all messages, such as messages[].name: headers have no room for thousands.
    """
    names: set[str] = set()
    for number, message in enumerate(messages):
        if others := message.keys() - _MESSAGE_FIELDS:
            given = [(name, message[name]) for name in others]  # type: ignore[literal-required]
            unused = unused_of(given, REFUSED, f"messages[{number}].")
            names.update("messages[]." + name.partition(".")[2] for name in unused)
        if isinstance(content := message.get("content"), list):
            others = set().union(*content) - _PART_FIELDS
            names.update(f"messages[].content[].{name}" for name in others)
    return sorted(names)
