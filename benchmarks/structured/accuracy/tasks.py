"""The tasks, and whether an answer has the form and is right.

extraction.json has texts with a JSON schema and the expected object, tools.json requests with three to six
tools and the expected call, or none.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from benchmarks.structured.accuracy.rows import Row
from headrace.client import tool
from headrace.v1 import generation_pb2 as pb

HERE = Path(__file__).parent

_TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Extraction:
    """A text, and the object that it contains.

    schema   of the object
    """

    id: str
    text: str
    schema: dict[str, Any]
    expected: dict[str, Any]

    @property
    def prompt(self) -> str:
        """The same with and without enforcement, so it must describe the form."""
        return (
            f"Extract the data from the text as JSON that matches this schema: {json.dumps(self.schema)}\n\n"
            f"Text: {self.text}\n\nReply with the JSON only."
        )

    def valid(self, answer: Row) -> bool:
        """Whether the whole answer is JSON that matches the schema."""
        try:
            jsonschema.validate(json.loads(answer.text), self.schema)
        except (ValueError, jsonschema.ValidationError):
            return False
        return True

    def right(self, answer: Row) -> bool:
        """Whether the first object in the answer, perhaps with text around it, has the expected values."""
        return _alike(first_object(answer.text), self.expected)


@dataclass(frozen=True)
class Choice:
    """A request beside tools.

    name, arguments   of the expected call; None: no tool fits
    """

    id: str
    tools: tuple[pb.Tool, ...]
    prompt: str
    name: str | None
    arguments: dict[str, Any] | None

    def valid(self, answer: Row) -> bool:
        """Whether all calls are of the tools, with arguments that match, and there is one if a tool fits."""
        calls = answer.calls
        if calls is None or (self.name is not None and not calls):
            return False
        return all(self._matches(call) for call in calls)

    def _matches(self, call: dict[str, Any]) -> bool:
        schemas = {tool.name: json.loads(tool.parameters) for tool in self.tools}
        name = call.get("name")
        if not isinstance(name, str) or name not in schemas:
            return False
        return jsonschema.Draft202012Validator(schemas[name]).is_valid(call.get("arguments"))

    def right(self, answer: Row) -> bool:
        """Whether the only call is the expected one, or there is none if no tool fits."""
        calls = answer.calls
        if self.name is None:
            return calls == []
        if not calls or len(calls) != 1:
            return False
        return calls[0].get("name") == self.name and _alike(calls[0].get("arguments"), self.arguments)


def extractions() -> list[Extraction]:
    """Return the extraction tasks."""
    kinds = json.loads((HERE / "extraction.json").read_text())
    return [
        Extraction(f"{kind}-{place}", text, content["schema"], expected)
        for kind, content in kinds.items()
        for place, (text, expected) in enumerate(content["items"])
    ]


def choices() -> list[Choice]:
    """Return the tool-choice tasks."""
    content = json.loads((HERE / "tools.json").read_text())
    known = {}
    for name, (description, properties, required) in content["tools"].items():
        schema = {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
        known[name] = tool(name, description, schema)
    return [
        Choice(f"tools-{place}", tuple(known[each] for each in names), prompt, name, arguments)
        for place, (names, prompt, name, arguments) in enumerate(content["items"])
    ]


TASKS: dict[str, Extraction | Choice] = {
    **{task.id: task for task in extractions()},
    **{task.id: task for task in choices()},
}


def first_object(text: str) -> object:
    """Return the first JSON object in a text; None if there is none."""
    decoder = json.JSONDecoder()
    for found in re.finditer(r"\{", text):
        try:
            return decoder.raw_decode(text, found.start())[0]
        except (ValueError, RecursionError):
            continue
    return None


def written_calls(text: str, *, marked: bool) -> list[dict[str, Any]] | None:
    """Return the calls that a model wrote as text; None if one of them is no JSON object.

    marked   whether calls are between <tool_call> and </tool_call>; else the whole answer is one call or text
    """
    parts = _TOOL_CALL.findall(text) if marked else [text.strip()] if text.strip().startswith("{") else []
    calls = []
    for part in parts:
        try:
            call = json.loads(part)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict):
            return None
        calls.append(call)
    return None if marked and not calls and "<tool_call>" in text else calls


def _alike(found: object, expected: object) -> bool:
    """Whether two JSON values agree, up to case and plural of texts."""
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(_alike(found[key], expected[key]) for key in expected)
        )
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(_alike, found, expected))
    if isinstance(expected, str):
        return isinstance(found, str) and _plain(found) == _plain(expected)
    if isinstance(expected, bool) or expected is None:
        return found is expected
    return isinstance(found, int | float) and not isinstance(found, bool) and found == expected


def _plain(text: str) -> str:
    return text.strip().strip(".!\"'").casefold().removesuffix("s")
