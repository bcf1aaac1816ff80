"""The examples of docs/openai.md for tool calls and structured output work as printed."""

from __future__ import annotations

import json
import re
import shlex
import sys
from asyncio import create_subprocess_exec, subprocess, timeout
from pathlib import Path

from headrace.v1 import generation_pb2 as pb
from tests.gateway.fake_router import TEXT, Edge
from tests.harness import PATIENCE

PAGE = (Path(__file__).parents[4] / "docs" / "openai.md").read_text()
ADDRESS = "http://127.0.0.1:8080/v1"


def section(heading: str, language: str) -> str:
    """Return the only block of a language under a heading."""
    text = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(block)


async def printed(example: str, folder: Path, plain: Edge) -> str:
    """Run an example in Python, and return what it prints."""
    script = folder / "example.py"
    script.write_text(example.replace(ADDRESS, plain.url))
    assert plain.url in script.read_text()
    process = await create_subprocess_exec(
        sys.executable, str(script), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    async with timeout(PATIENCE):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_an_answer_is_parsed(plain: Edge, tmp_path: Path) -> None:
    plain.router.tokens = [b'{"customer": "Ann", "total": 12.5}']

    output = await printed(section("Structured output", "py"), tmp_path, plain)

    assert output == "customer='Ann' total=12.5\n"
    assert list(json.loads(plain.asked.sampling.json_schema)["properties"]) == ["customer", "total"]


async def test_curl_sends_a_choice(plain: Edge) -> None:
    words = shlex.split(section("Structured output", "sh"))
    body = json.loads(words[words.index("-d") + 1])

    response = await plain.http.post("/chat/completions", json=body)

    assert response.status_code == 200
    assert list(plain.asked.sampling.choices.texts) == ["yes", "no"]


async def test_the_loop_of_calls_ends_with_an_answer(plain: Edge, tmp_path: Path) -> None:
    plain.router.tool_calls = [pb.ToolCallDelta(id="call_1", name="weather", arguments='{"town": "Bonn"}')]

    output = await printed(section("Tool calls", "py"), tmp_path, plain)

    assert output == TEXT + "\n"
    user, call, result = plain.asked.chat.messages
    assert (user.role, call.role) == ("user", "assistant")
    assert result == pb.Message(role="tool", tool_call_id="call_1", content="It is sunny in Bonn.")
