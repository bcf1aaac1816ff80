"""What `headrace chat` sends and shows of answers in a form, calls of tools and thoughts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace import errors
from headrace.cli.__main__ import app
from headrace.cli.answers import Answer
from headrace.cli.calls.chat import ChatOptions, print_answer, request_for
from headrace.cli.calls.connection import Connection
from headrace.cli.files.forms import read_schema, read_tools
from headrace.client import tool
from tests.router.answering.test_forms import CALL, FormBatcher
from tests.router.fake_batchers import FakeBatcher, routed

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = tool("weather", "Returns the weather.", SCHEMA)
CONNECTION = Connection(target="127.0.0.1:1")


async def test_text_and_calls_are_the_answer_and_thoughts_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    options = ChatOptions(connection=CONNECTION, tools=[WEATHER])
    fake = FormBatcher(deltas=CALL)
    async with routed(only=fake) as client:
        await print_answer(client, request_for([("user", "Weather?")], options), options, Answer())

    shown = capsys.readouterr()
    assert shown.out == ('Let me look. \nweather({"city": "Paris"})\nweather({"city": "Rome"})\n')
    assert shown.err.startswith("They ask for a city.\ntier only")
    assert list(fake.requests[0].chat.tools) == [WEATHER]


async def test_what_was_delivered_of_an_answer_that_broke_off_is_printed_before_the_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ChatOptions(connection=CONNECTION)
    answer = Answer()
    async with routed(only=FakeBatcher(text_only=True, breaks=[5])) as client:
        with pytest.raises(errors.UpstreamLost, match="broke off after about 5 tokens"):
            await print_answer(client, request_for([("user", "Hello you")], options), options, answer)

    assert capsys.readouterr().out == "Hello\n"
    assert (answer.tokens, answer.finish) == (5, "")


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [("json_schema", "json_schema", "{}"), ("json_object", "json_object", True), ("regex", "regex", "a+")],
)
def test_a_form_is_sent_with_the_prompt(option: str, field: str, value: object) -> None:
    request = request_for([("user", "x")], ChatOptions(connection=CONNECTION, **{option: value}))  # type: ignore[arg-type]

    assert request.sampling.WhichOneof("structured") == field
    assert getattr(request.sampling, field) == value


def test_tools_are_read_in_both_forms(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    own = {"name": "weather", "description": "Returns the weather.", "parameters": SCHEMA}
    path.write_text(json.dumps([own, {"type": "function", "function": own}, {"name": "clock"}]))

    assert read_tools(path) == [WEATHER, WEATHER, tool("clock", "")]


@pytest.mark.parametrize(
    "content", ["{", "[1]", '[{"description": "x"}]', '[{"name": 5}]', "5", "[" * 100_000]
)
def test_a_file_without_tools_says_what_it_must_contain(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tools.json"
    path.write_text(content)

    with pytest.raises(errors.InvalidRequest, match="must be a JSON list of tools"):
        read_tools(path)


def test_a_schema_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_bytes(b"\xff")

    with pytest.raises(errors.InvalidText, match="not UTF-8"):
        read_schema(path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--json", "--regex", "a"], "at most one of"),
        (["--json-schema", "/nowhere/schema.json"], "No such file"),
        (["--tools", "/nowhere/tools.json"], "No such file"),
    ],
)
def test_what_cannot_be_sent_is_an_error_in_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["chat", *arguments, "Hello"])

    assert result.exit_code != 0
    assert said in result.output
    assert len(result.output.splitlines()) == 1
