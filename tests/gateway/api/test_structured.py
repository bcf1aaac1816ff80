"""The parameters for the form of an answer become one field of the mesh, on both paths."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from tests.gateway.fake_router import Edge

SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"const": 1.0}, "é": {}}}
JSON = '{"type":"object","properties":{"z":{"type":"string"},"a":{"const":1.0},"é":{}}}'
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}

PATHS = ["chat/completions", "completions"]


async def ask(plain: Edge, path: str, **parameters: Any) -> httpx.Response:
    """Send a request with parameters to one of both paths."""
    given = {"prompt": "Hi"} if path == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    return await plain.http.post(f"/{path}", json={**given, **parameters})


FORMS: list[tuple[dict[str, Any], pb.Sampling]] = [
    ({"response_format": JSON_SCHEMA}, pb.Sampling(json_schema=JSON)),
    ({"response_format": {"type": "json_object"}}, pb.Sampling(json_object=True)),
    ({"response_format": {"type": "text"}}, pb.Sampling()),
    ({"structured_outputs": {"json": SCHEMA}}, pb.Sampling(json_schema=JSON)),
    ({"structured_outputs": {"json": "{ }"}}, pb.Sampling(json_schema="{ }")),
    ({"structured_outputs": {"json_object": True}}, pb.Sampling(json_object=True)),
    ({"structured_outputs": {"json_object": False}}, pb.Sampling()),
    ({"structured_outputs": {"regex": "a+"}}, pb.Sampling(regex="a+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, pb.Sampling(choices=pb.Choices(texts=["a", "b"]))),
    ({"structured_outputs": {"grammar": "start: /a/"}}, pb.Sampling(lark="start: /a/")),
    ({"structured_outputs": {}}, pb.Sampling()),
    ({"guided_json": SCHEMA}, pb.Sampling(json_schema=JSON)),
    ({"guided_json": "{ }"}, pb.Sampling(json_schema="{ }")),
    ({"guided_regex": "a+"}, pb.Sampling(regex="a+")),
    ({"guided_choice": ["a", "b"]}, pb.Sampling(choices=pb.Choices(texts=["a", "b"]))),
    ({"guided_grammar": "start: /a/"}, pb.Sampling(lark="start: /a/")),
    ({"response_format": {"type": "text"}, "guided_regex": "a"}, pb.Sampling(regex="a")),
    ({"response_format": None, "structured_outputs": {"regex": "a", "json": None}}, pb.Sampling(regex="a")),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("parameters", "sampling"), FORMS, ids=str)
async def test_each_form_becomes_that_of_the_mesh(
    plain: Edge, path: str, parameters: dict[str, Any], sampling: pb.Sampling
) -> None:
    response = await ask(plain, path, **parameters)

    assert response.status_code == 200, response.text
    assert "x-headrace-ignored" not in response.headers
    asked = plain.asked.sampling
    asked.ClearField("seed")
    asked.ClearField("max_tokens")
    assert asked == sampling


@pytest.mark.parametrize("strict", [True, False, None])
async def test_a_schema_is_enforced_whether_strict_or_not(plain: Edge, strict: bool | None) -> None:
    schema = {"name": "n", "strict": strict, "schema": SCHEMA}
    await plain.chat(response_format={"type": "json_schema", "json_schema": schema})

    assert plain.asked.sampling.json_schema == JSON


async def test_options_without_effect_are_named_in_the_header(plain: Edge) -> None:
    schema = {"name": "n", "description": "d", "schema": {}, "x": 1}
    one = await plain.chat(response_format={"type": "json_schema", "json_schema": schema, "y": 1})
    other = await plain.chat(structured_outputs={"regex": "a", "disable_any_whitespace": True})

    assert one.headers["x-headrace-ignored"] == (
        "response_format.y, response_format.json_schema.description, response_format.json_schema.x"
    )
    assert other.headers["x-headrace-ignored"] == "structured_outputs.disable_any_whitespace"


LARGE = {"enum": ["x" * 1000] * 66}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": "json"}, "response_format", "is 'json', must be an object"),
    ({"response_format": {}}, "response_format.type", "is missing: set it"),
    (
        {"response_format": {"type": "structural_tag"}},
        "response_format.type",
        "is 'structural_tag', must be 'text', 'json_object' or 'json_schema'",
    ),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing: set the"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
        "is missing: set the schema of the answer",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
        "response_format.json_schema.schema",
        "is a list, must be an object",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": LARGE}}},
        "response_format.json_schema.schema",
        "has more than 65536 bytes as JSON: shorten it",
    ),
    ({"guided_json": {"a": "é" * 33_000}}, "guided_json", "has more than 65536 bytes as JSON: shorten it"),
    ({"guided_json": 5}, "guided_json", "is 5, must be a string or an object"),
    ({"guided_regex": 5}, "guided_regex", "is 5, must be a string"),
    ({"guided_choice": "a"}, "guided_choice", "is 'a', must be a list"),
    ({"guided_choice": ["a", 5]}, "guided_choice[1]", "is 5, must be a string"),
    ({"guided_choice": ["a"] * 1025}, "guided_choice", "has more than 1024 elements: remove some"),
    ({"structured_outputs": []}, "structured_outputs", "is a list, must be an object"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "is 5, must be a string or an object"),
    ({"structured_outputs": {"choice": [5]}}, "structured_outputs.choice[0]", "is 5, must be a string"),
    (
        {"structured_outputs": {"structural_tag": "{}"}},
        "structured_outputs.structural_tag",
        "is not supported: use tools, or grammar",
    ),
    (
        {"structured_outputs": {"regex": "a", "json": {}}},
        "structured_outputs.regex",
        "is set together with structured_outputs.json: an answer has one form",
    ),
    (
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
        "guided_regex",
        "is set together with response_format: an answer has one form",
    ),
    (
        {"response_format": JSON_SCHEMA, "structured_outputs": {"choice": ["a"]}},
        "structured_outputs.choice",
        "is set together with response_format.json_schema.schema: an answer has one form",
    ),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("parameters", "param", "complaint"), WRONG, ids=lambda value: str(value)[:80])
async def test_a_wrong_form_is_explained(
    plain: Edge, path: str, parameters: dict[str, Any], param: str, complaint: str
) -> None:
    response = await ask(plain, path, **parameters)

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param} {complaint}")
    assert not plain.router.requests


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("parameters", "field", "param"),
    [
        ({"response_format": JSON_SCHEMA}, "sampling.json_schema", "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}}, "sampling.json_object", "response_format"),
        ({"structured_outputs": {"json": "{}"}}, "sampling.json_schema", "structured_outputs.json"),
        ({"structured_outputs": {"choice": ["a"]}}, "sampling.choices", "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"]}}, "sampling.choices.texts", "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "a"}}, "sampling.lark", "structured_outputs.grammar"),
        ({"guided_regex": "("}, "sampling.regex", "guided_regex"),
        ({"guided_regex": "("}, "sampling.structured", "guided_regex"),
    ],
    ids=str,
)
async def test_errors_of_the_mesh_about_the_form_name_the_callers_parameter(
    plain: Edge, path: str, parameters: dict[str, Any], field: str, param: str
) -> None:
    plain.router.refuses = errors.InvalidSampling(f"{field} is wrong at /a", field=field)
    response = await ask(plain, path, **parameters)

    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["message"]) == (param, f"{param} is wrong at /a")


async def test_the_end_of_a_turn_is_no_token_of_an_echo_with_a_form(plain: Edge) -> None:
    """With ignore_eos, which evaluation harnesses need otherwise, no form could end."""
    await ask(plain, "completions", echo=True, logprobs=1, max_tokens=1, guided_regex="a+")

    assert not plain.asked.sampling.ignore_eos
