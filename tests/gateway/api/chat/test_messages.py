"""Messages of OpenAI's API become those of the mesh, and what cannot is refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.fake_router import Edge


async def test_all_roles_are_passed_on(plain: Edge) -> None:
    roles = ("system", "developer", "user", "assistant", "tool", "user")
    turns = [{"role": role, "content": f"I am {role}"} for role in roles]

    response = await plain.chat(messages=turns)

    assert response.status_code == 200, response.text
    assert [(turn.role, turn.content) for turn in plain.asked.chat.messages] == [
        (role, f"I am {role}") for role in roles
    ]


async def test_parts_of_text_are_joined_by_line_breaks(plain: Edge) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]

    await plain.chat(messages=[{"role": "user", "content": parts}])

    assert plain.asked.chat.messages[0].content == "one\ntwo"


async def test_an_assistants_refusal_is_what_it_said(plain: Edge) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "Never."}]},
        {"role": "user", "content": "c"},
        {"role": "assistant"},
        {"role": "user", "content": "d"},
    ]

    response = await plain.chat(messages=turns)

    assert response.status_code == 200
    texts = [turn.content for turn in plain.asked.chat.messages]
    assert texts == ["a", "No.", "b", "Never.", "c", "", "d"]


async def test_fields_of_messages_without_effect_are_named_in_the_header(plain: Edge) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}], "mood": "good"},
        {"role": "tool", "content": "b", "tool_calls": [], "audio": None},
        {"role": "user", "content": "c", "mood": "bad", "extra": None},
    ]

    response = await plain.chat(messages=turns)

    assert response.headers["x-headrace-ignored"] == ("messages[].content[].cache_control, messages[].mood")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"function_call": {"name": "f"}}, "messages[0].function_call", "is not supported: use tool_calls"),
    ({"audio": {"id": "1"}}, "messages[0].audio", "is not supported: the models of this server read text"),
    (
        {"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]},
        "messages[0].content[1].type",
        "is 'image_url', which is not supported: the models of this server read text only",
    ),
    ({"content": [{"type": "input_audio"}]}, "messages[0].content[0].type", "is 'input_audio', which"),
    ({"content": [{"type": "file"}]}, "messages[0].content[0].type", "is 'file', which is not supported"),
    ({"content": [{"type": "new"}]}, "messages[0].content[0].type", "is 'new', which is not supported: send"),
    ({"content": [{"type": "text"}]}, "messages[0].content[0].text", "is missing: set the text of the part"),
    ({"content": [{"text": "a"}]}, "messages[0].content[0].type", "is missing: set it"),
    ({"content": [5]}, "messages[0].content[0]", "is 5, must be an object"),
    ({"content": [{"type": "text", "text": 5}]}, "messages[0].content[0].text", "is 5, must be a string"),
    ({"content": []}, "messages[0].content", "is empty: set its text"),
]


@pytest.mark.parametrize(("fields", "param", "complaint"), REFUSED, ids=str)
async def test_what_is_no_text_is_refused_in_words(
    plain: Edge, fields: dict[str, Any], param: str, complaint: str
) -> None:
    response = await plain.chat(messages=[{"role": "user", "content": "a", **fields}])

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param} {complaint}")
