"""Record prompt and answer on a span, for batchers that are asked to: see `--trace-content`.

The attributes are those of the GenAI conventions: JSON lists of messages, each with its parts. Their text is
limited, so that spans stay small: the end of a long conversation is kept, and the beginning of a long answer.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
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
        self._answer: list[str] = []
        self._room = MAX_CHARACTERS
        self._finish = ""

    async def write(self, response: pb.GenerateResponse) -> None:
        """Pass an event on, and keep its text."""
        if response.HasField("delta") and self._room >= 0:
            text = response.delta.text
            self._answer.append(text if len(text) <= self._room else text[: self._room] + OMITTED)
            self._room -= len(text)
        elif response.HasField("finish"):
            self._finish = finish_name(response.finish.reason)
        await self._write(response)

    def attributes(self) -> dict[str, str]:
        """Return the attributes of the span."""
        answer = _message("assistant", "".join(self._answer))
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
        kept.append(_message(message.role, _end(message.content, room)))
        room -= len(message.content)
    return kept[::-1]


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else OMITTED + text[-most:]


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}
