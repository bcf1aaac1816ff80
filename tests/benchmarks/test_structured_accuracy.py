"""The tasks of the accuracy benchmark: what counts as valid and as right."""

from __future__ import annotations

import json

import pytest

from benchmarks.structured.accuracy.drafts import auc
from benchmarks.structured.accuracy.rows import Row
from benchmarks.structured.accuracy.tasks import choices, extractions, written_calls


def row(text: str = "", calls: object = None) -> Row:
    return Row("x", "y", text, calls, [-0.1])  # type: ignore[arg-type]


def test_the_expected_objects_are_valid_and_right() -> None:
    tasks = extractions()
    assert len(tasks) == 40
    for task in tasks:
        text = json.dumps(task.expected)
        fenced = row(f"Sure!\n```json\n{text.upper().replace('NULL', 'null')}\n```")
        assert task.valid(row(text))
        assert task.right(row(text))
        assert task.right(row(f"Sure: {text}"))
        assert not task.valid(fenced)
        assert not task.valid(row(text[:-1]))
        assert not task.right(row(json.dumps({**task.expected, next(iter(task.expected)): "another"})))


def test_the_expected_calls_are_valid_and_right_and_no_others() -> None:
    tasks = choices()
    assert len(tasks) == 40
    assert {task.name is None for task in tasks} == {True, False}
    for task in tasks:
        assert 3 <= len(task.tools) <= 6
        calls = [] if task.name is None else [{"name": task.name, "arguments": task.arguments}]
        assert task.valid(row(calls=calls))
        assert task.right(row(calls=calls))
        assert not task.right(row(calls=[*calls, *calls] or [{"name": task.tools[0].name, "arguments": {}}]))
        assert not task.right(row(calls=None))
        assert task.right(row(calls=[])) == task.valid(row(calls=[])) == (task.name is None)


@pytest.mark.parametrize(
    ("text", "marked", "calls"),
    [
        ('<tool_call>\n{"name": "f"}\n</tool_call>', True, [{"name": "f"}]),
        ("Hello!", True, []),
        ("<tool_call>{", True, None),
        ("<tool_call>[1]</tool_call>", True, None),
        (' {"name": "f"}', False, [{"name": "f"}]),
        ('{"name": "f"', False, None),
        ("Hello!", False, []),
    ],
)
def test_calls_are_read_from_text(text: str, marked: bool, calls: object) -> None:
    assert written_calls(text, marked=marked) == calls


def test_auc_counts_pairs() -> None:
    assert auc([(0.9, True), (0.1, False), (0.5, False), (0.5, True)]) == 0.875
