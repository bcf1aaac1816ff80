"""Record prompt and answer on a span, for batchers that are asked to: see `--trace-content`.

The attributes are those of the GenAI conventions: JSON lists of messages, each with its parts. Their text is
limited, so that spans stay small: the end of a long conversation is kept, and the beginning of a long answer.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from headrace import attributes
from headrace.metrics.requests import finish_name
from headrace.v1 import generation_pb2 as pb

MAX_CHARACTERS = 8192  # of all messages of an attribute
MAX_IDS = 1024  # of a prompt of token ids
OMITTED = "..."  # in place of the rest


class RecordedText:
    """Collects the text of one request, and of its answer as it is written."""

    def __init__(
        self, request: pb.GenerateRequest, write: Callable[[pb.GenerateResponse], Awaitable[None]]
    ) -> None:
        self._request = request
        self._write = write
        self._reasoning: list[str] = []
        self._text: list[str] = []
        self._calls: list[pb.ToolCall] = []
        self._room = MAX_CHARACTERS
        self._finish = ""

    async def write(self, response: pb.GenerateResponse) -> None:
        """Pass an event on, and keep its text."""
        if response.HasField("delta") and self._room >= 0:
            delta = response.delta
            self._reasoning.append(self._kept(delta.reasoning))
            self._text.append(self._kept(delta.text))
            for part in delta.tool_calls:
                if part.name or not self._calls:  # of an answer that is resumed, the name came earlier
                    self._calls.append(pb.ToolCall(id=part.id, name=part.name))
                self._calls[-1].arguments += self._kept(part.arguments)
        elif response.HasField("finish"):
            self._finish = finish_name(response.finish.reason)
        await self._write(response)

    def _kept(self, text: str) -> str:
        room, self._room = self._room, self._room - len(text)
        return text if len(text) <= room else text[: max(room, 0)] + OMITTED

    def attributes(self) -> dict[str, str]:
        """Return the attributes of the span."""
        answer = _message("assistant", "".join(self._text), "".join(self._reasoning), self._calls)
        if self._finish:
            answer["finish_reason"] = self._finish
        return {
            attributes.GEN_AI_INPUT_MESSAGES: json.dumps(_asked(self._request), ensure_ascii=False),
            attributes.GEN_AI_OUTPUT_MESSAGES: json.dumps([answer], ensure_ascii=False),
        }


def _asked(request: pb.GenerateRequest) -> list[dict[str, Any]]:
    """Return the last messages of a request, within MAX_CHARACTERS, or the last token ids of a prompt."""
    if request.HasField("token_ids"):
        ids = request.token_ids.ids
        return [{"role": "user", "parts": [{"type": "token_ids", "count": len(ids), "ids": ids[-MAX_IDS:]}]}]
    if not request.HasField("chat"):
        return [_message("user", _end(request.prompt, MAX_CHARACTERS))]
    kept: list[dict[str, Any]] = []
    room = MAX_CHARACTERS
    for message in reversed(request.chat.messages):
        if room <= 0:
            break
        content = _end(message.content, room)
        room -= len(message.content)
        if message.tool_call_id:
            part = {"type": "tool_call_response", "id": message.tool_call_id, "response": content}
            kept.append({"role": message.role, "parts": [part]})
            continue
        reasoning = _end(message.reasoning, max(room, 0))
        room -= len(message.reasoning)
        calls = []
        for call in message.tool_calls:
            arguments = _end(call.arguments, max(room, 0))
            room -= len(call.arguments)
            calls.append(pb.ToolCall(id=call.id, name=call.name, arguments=arguments))
        kept.append(_message(message.role, content, reasoning, calls))
    return kept[::-1]


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else OMITTED + text[len(text) - most :]


def _message(role: str, text: str, reasoning: str = "", calls: Iterable[pb.ToolCall] = ()) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    if reasoning:
        parts.append({"type": "reasoning", "content": reasoning})
    called = [
        {"type": "tool_call", "id": call.id, "name": call.name, "arguments": _arguments(call.arguments)}
        for call in calls
    ]
    if text or not (parts or called):
        parts.append({"type": "text", "content": text})
    return {"role": role, "parts": parts + called}


def _arguments(text: str) -> Any:
    """Return the arguments of a call as an object, or as they are if they are cut off."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
