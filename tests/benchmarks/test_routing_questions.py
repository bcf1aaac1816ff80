"""The rules that decide whether a live answer was right."""

from __future__ import annotations

import pytest

from benchmarks.routing.questions import DIALOGUES, Question, load


@pytest.mark.parametrize(
    ("kind", "answer", "said", "right"),
    [
        ("number", "1625", "1,250 + 375 = 1,625.", True),
        ("number", "30", "15 % of 200 is 30.0", True),
        ("number", "7", "7 + 8 = 15", False),
        ("number", "7", "seven", False),
        ("text", "Lima", "The capital of Peru is Lima.", True),
        ("text", "Au", "August", False),
        ("exact", "RIVER", "The word is: 'RIVER'.", True),
        ("exact", "RIVER", "River", False),
        ("exact", "tac", "'cat' backwards is **tac**", True),
        ("exact", "apple", "apple, then mango, then pear", False),
        ("choice", "B", "B. dolphin", True),
        ("choice", "B", "The answer is: B", True),
        ("choice", "B", "A. shark\nB. dolphin\nC. trout", False),
        ("choice", "A", "A dolphin is a mammal.", False),
    ],
)
def test_an_answer_is_right_by_its_kind_of_check(kind: str, answer: str, said: str, right: bool) -> None:
    assert Question("id", "family", "?", kind, (answer,)).right(said) is right


def test_the_questions_are_many_different_and_can_all_be_answered() -> None:
    questions = load()

    assert len(questions) >= 100
    assert len({question.id for question in questions}) == len(questions)
    assert len({question.prompt for question in questions}) == len(questions)
    for question in questions:
        assert question.right(question.answers[0]), question.id
        assert not question.right(""), question.id


def test_the_dialogues_have_several_turns_and_their_last_ones_can_be_answered() -> None:
    dialogues = load(DIALOGUES)

    assert len({dialogue.id for dialogue in dialogues}) == len(dialogues) >= 50
    assert len({dialogue.turns for dialogue in dialogues}) == len(dialogues)
    for dialogue in dialogues:
        assert len(dialogue.turns) >= 2, dialogue.id
        assert not dialogue.right(""), dialogue.id
        if dialogue.kind != "python":
            assert dialogue.right(dialogue.answers[0]), dialogue.id
