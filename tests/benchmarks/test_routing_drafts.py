"""The check of drafts is fitted to what it may be, and by what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.routing import drafts
from benchmarks.routing.execution import passes
from benchmarks.routing.generate import read
from benchmarks.routing.questions import Question, load
from benchmarks.routing.templates import HELD_OUT, questions
from headrace.routing.drafts import check as draft_check

ROWS = list(read())


@pytest.mark.parametrize(
    ("kind", "answers", "said", "right"),
    [
        ("answer", ("21",), "The answer is 21. 3 were eaten.", True),
        ("answer", ("21",), "24 - 3 = 21", True),
        ("answer", ("21",), "The answer is 24, not 21", False),
        ("named", ("Rosa", "Jonas"), "Jonas is tall. Rosa is taller than Jonas.", True),
        ("named", ("Rosa", "Jonas"), "Rosa is tall. Jonas is the tallest.", False),
        ("named", ("3/4", "1/3"), "The greater one is 1/3.", False),
        ("named", ("9.9", "9.11"), "9.9", True),
        ("last_named", ("Thursday", "Friday"), "After Friday? It is Thursday.", True),
        ("sequence", ("a", "b"), "1. a\n2. b", True),
        ("sequence", ("a", "b"), "b, a", False),
        ("exactly", ("x, y",), "```\nx, y\n```", True),
        ("exactly", ("x, y",), "Here it is: x, y", False),
        ("json", ('{"a": 1}',), 'Sure: {"a": 1}', True),
        ("json", ('{"a": 1}',), "{a: 1}", False),
        ("python", ("assert f(2) == 4",), "```python\ndef f(x):\n    return x * x\n```", True),
        ("python", ("assert f(2) == 5",), "```python\ndef f(x):\n    return x * x\n```", False),
    ],
)
def test_an_answer_is_right_by_its_kind_of_check(
    kind: str, answers: tuple[str, ...], said: str, right: bool
) -> None:
    assert Question("id", "family", "?", kind, answers).right(said) is right


@pytest.mark.parametrize(
    "code",
    ["def f(x):\n    while True: pass", "def f(x):\n    return bytearray(1 << 40)", "def f(x):\n    exit(0)"],
)
def test_code_that_never_ends_wants_too_much_or_leaves_early_is_not_right(code: str) -> None:
    assert not passes(code, ["assert f(1) is None"])


def test_questions_are_the_same_each_time_and_none_is_of_the_live_evaluation() -> None:
    made = questions(per_family=40, word_problems=40)

    assert made == questions(per_family=40, word_problems=40)
    assert len({question.prompt for question in made}) == len(made)
    assert not {question.prompt for question in made} & {question.prompt for question in load()}
    assert len({question.family for question in made} - set(HELD_OUT)) >= 8


def test_no_draft_of_a_held_out_family_and_none_of_the_live_questions_teaches() -> None:
    live = {question.prompt for question in load()}

    taught = drafts.taught(ROWS)

    assert len(taught) > 1000
    assert not {row.family for row in taught} & set(HELD_OUT)
    assert not {row.prompt for row in ROWS} & live


def test_without_corrections_the_order_is_the_one_set_by_hand() -> None:
    hand, data = drafts.by_hand(), drafts.see(drafts.taught(ROWS)[:400], "text")

    fitted = drafts.fit(data, hand, 0.0)

    before, after = drafts.good(hand, data.x), drafts.good(fitted, data.x)
    assert drafts.area(before, data.right) == pytest.approx(drafts.area(after, data.right), abs=0.005)
    assert drafts.log_loss(after, data.right, drafts._balanced(data.rows)) < drafts.log_loss(
        before, data.right, drafts._balanced(data.rows)
    )


def test_a_finding_that_the_rows_would_have_speak_for_a_draft_is_silenced() -> None:
    rows = drafts.taught(ROWS)[:200]
    x = np.zeros((200, len(drafts.NAMES)))
    hedges = drafts.NAMES.index("hedging")
    x[::2, hedges] = 1.0
    data = drafts.Measured(rows, x, x[:, hedges])

    fitted = drafts.fit(data, drafts.by_hand(), 0.8)

    assert fitted.weights["hedging"] == 0.0


def test_the_artifact_is_what_the_drafts_give(tmp_path: Path) -> None:
    shipped = json.loads(draft_check.SHIPPED.read_text())["evidence"]
    spreads = {evidence: float(shipped[evidence]["spread"]) for evidence in draft_check.EVIDENCE}
    made = {
        evidence: (spread, drafts.fit(drafts.see(drafts.taught(ROWS), evidence), drafts.by_hand(), spread))
        for evidence, spread in spreads.items()
    }
    drafts.save(made, tmp_path / "check.json")

    assert (tmp_path / "check.json").read_bytes() == draft_check.SHIPPED.read_bytes()
