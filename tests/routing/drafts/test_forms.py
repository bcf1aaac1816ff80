"""A draft that must have a form is useless without it."""

from __future__ import annotations

import pytest

from headrace.routing.drafts.forms import BAD_ARGUMENTS, CUT_OFF, NOT_JSON, fault


@pytest.mark.parametrize(
    ("text", "arguments", "complete", "is_json", "found"),
    [
        ('{"a": 1}', [], True, True, ""),
        ('{"a": 1', [], True, True, NOT_JSON),
        ("", [], True, True, NOT_JSON),
        ("[" * 100_000, [], True, True, NOT_JSON),
        ("yes", [], True, False, ""),
        ("ye", [], False, False, CUT_OFF),
        ('{"a": 1}', [], False, True, CUT_OFF),
        ("", ['{"city": "Rome"}', "{}"], True, False, ""),
        ("", [""], True, False, ""),
        ("", ['{"city": "Ro'], True, False, BAD_ARGUMENTS),
        ("", ['["Rome"]'], True, False, BAD_ARGUMENTS),
        ("Let me look.", ['{"city": "Rome"}'], True, True, ""),
    ],
)
def test_a_draft_needs_its_whole_form(
    text: str, arguments: list[str], complete: bool, is_json: bool, found: str
) -> None:
    assert fault(text, arguments, complete=complete, is_json=is_json) == found
