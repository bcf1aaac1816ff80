"""Read the prompt of a request: the turns to score, the text that a draft answers, and its size."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.routing.scoring.conversation import Turn, window
from headrace.v1 import generation_pb2 as pb

TOKEN_CHARACTERS = 4  # of a prompt, per token, as is usual for English
MESSAGE_TOKENS = 8  # of the chat template, per message

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


def estimated_tokens(request: pb.GenerateRequest) -> float:
    """Return how many tokens a prompt probably has, with those of an answer that the request resumes."""
    if request.HasField("chat"):
        messages = request.chat.messages
        characters = sum(tool.ByteSize() for tool in request.chat.tools)
        for message in messages:
            characters += len(message.content) + sum(call.ByteSize() for call in message.tool_calls)
        prompt = characters / TOKEN_CHARACTERS + MESSAGE_TOKENS * len(messages)
    elif request.HasField("token_ids"):
        prompt = float(len(request.token_ids.ids))
    else:
        prompt = len(request.prompt) / TOKEN_CHARACTERS
    return prompt + len(request.resume.token_ids)
