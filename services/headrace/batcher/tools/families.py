"""The formats in which families of models write calls of tools."""

from __future__ import annotations

from enum import Enum


class Family(Enum):
    """A format of calls.

    HERMES    <tool_call>{"name": ..., "arguments": ...}</tool_call>, one after the other: Hermes, Qwen
    LLAMA3    {"name": ..., "parameters": ...}, perhaps after <|python_tag|>: Llama 3
    MISTRAL   [TOOL_CALLS] and a list of {"name": ..., "arguments": ...}
    JSON      {"name": ..., "arguments": ...} as the whole answer: models whose template knows no tools, which
              are told so by a system message
    """

    HERMES = "hermes"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"
    JSON = "json"


def family_of(template: str) -> Family:
    """Return the family of a chat template, from the markers in its text; JSON if it knows no tools."""
    if "<tool_call>" in template:
        return Family.HERMES
    if "[TOOL_CALLS]" in template:
        return Family.MISTRAL
    if "tools" in template and '"parameters"' in template:
        return Family.LLAMA3
    return Family.JSON
