"""Read the prompt of a request: the turns to score, and the text that a draft answers."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.routing.scoring.conversation import Turn, window
from headrace.v1 import generation_pb2 as pb

_ROLES = {"developer": "system"}  # other roles have the same name in a conversation


def turns_of(request: pb.GenerateRequest, texts: Mapping[int, str]) -> list[Turn]:
    """Return the turns to score: the chat's last ones, or the raw prompt, without the middle of long ones.

    Token ids have no text, so there are no turns.

    texts   as `check_request` returns them; other messages are decoded here, as far as they are read
    """
    if not request.HasField("chat"):
        return window([Turn("user", texts[0])]) if texts else []
    messages = request.chat.messages
    return window(
        Turn(
            _ROLES.get(role := messages[place].role, role),
            texts[place] if place in texts else messages[place].content,
        )
        for place in range(len(messages) - 1, -1, -1)
    )


def digest_of(request: pb.GenerateRequest) -> int:
    """Return what tells the prompts of requests without turns apart; 0 for those with turns."""
    return hash(request.token_ids.SerializeToString()) if request.HasField("token_ids") else 0


def text_of(request: pb.GenerateRequest) -> str:
    """Return the text that a draft answers: the raw prompt, or the user's last message.

    Answers to token ids are pinned to a model and never held back.
    """
    if request.HasField("chat"):
        messages = request.chat.messages
        for place in range(len(messages) - 1, -1, -1):
            if messages[place].role == "user":
                return messages[place].content
        return messages[-1].content
    return request.prompt
