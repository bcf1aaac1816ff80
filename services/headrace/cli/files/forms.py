"""Read the files of `headrace chat --json-schema` and `--tools`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from headrace import errors
from headrace.client import tool

if TYPE_CHECKING:
    from pathlib import Path

    from headrace.v1 import generation_pb2 as pb

_WANTED = (
    'must be a JSON list of tools, each with "name", "description" and "parameters", or as in requests of '
    "OpenAI's API"
)


def read_schema(path: Path) -> str:
    """Return the text of a file. Raises InvalidText if it is not UTF-8, and OSError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise errors.InvalidText(f"{path} is not UTF-8", field="sampling.json_schema") from None


def read_tools(path: Path) -> list[pb.Tool]:
    """Return the tools in a JSON file. Raises InvalidRequest with what it must contain, and OSError."""
    try:
        return [_tool(each) for each in json.loads(path.read_bytes())]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise errors.InvalidRequest(f"{path} {_WANTED}", field="chat.tools") from None


def _tool(each: dict[str, Any]) -> pb.Tool:
    each = each["function"] if each.get("type") == "function" else each
    return tool(each["name"], each.get("description") or "", each.get("parameters"))
