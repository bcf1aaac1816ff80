"""Make requests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headrace import errors
from headrace.v1 import generation_pb2 as pb


def chat(
    text: str | Sequence[tuple[str, str] | pb.Message],
    *,
    system: str = "",
    continue_final_message: bool = False,
    tools: Sequence[pb.Tool] = (),
    **sampling: object,
) -> pb.GenerateRequest:
    """Return a request for the answer to *text*, or to a conversation of messages or (role, content) pairs.

    continue_final_message   whether the answer continues the last message, which must be the assistant's
    tools                    that the model may call; see `tool`
    sampling                 fields of `headrace.v1.Sampling`, such as temperature=0, max_tokens=64,
                             stop=["\\n"]

    Raises InvalidText for text with lone surrogates, which result from decoding bytes of another encoding.
    """
    turns: list[tuple[str, str] | pb.Message] = [("user", text)] if isinstance(text, str) else list(text)
    if system:
        turns.insert(0, ("system", system))
    try:
        request = pb.GenerateRequest(sampling=pb.Sampling(**sampling))  # type: ignore[arg-type]
        request.chat.tools.extend(tools)
        for turn in turns:
            if isinstance(turn, pb.Message):
                request.chat.messages.append(turn)
            else:
                request.chat.messages.add(role=turn[0], content=turn[1])
    except UnicodeEncodeError as error:
        raise errors.InvalidText(f"the text is not valid UTF-8 from character {error.start} on") from None
    if continue_final_message:
        request.chat.continue_final_message = True
    return request


def tool(name: str, description: str, parameters: Mapping[str, Any] | None = None) -> pb.Tool:
    """Return a tool that a model may call.

    description   what it does and when to call it, for the model
    parameters    the JSON schema of its arguments, an object's; None: it has no arguments
    """
    schema = json.dumps(parameters, ensure_ascii=False) if parameters else ""
    return pb.Tool(name=name, description=description, parameters=schema)


def tool_result(call: pb.ToolCall, content: str) -> pb.Message:
    """Return the message with the result of a call, for the next request of the conversation."""
    return pb.Message(role="tool", content=content, tool_call_id=call.id, name=call.name)
