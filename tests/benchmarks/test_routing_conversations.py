"""Conversations that were written by hand after the rules: hard last turns score higher than easy ones."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.routing.conversations import auc, by_session, written
from headrace.routing.scoring import scorer

shipped = scorer.load()


def test_hard_last_turns_score_higher_than_easy_ones() -> None:
    _, dialogues = written("held_out")
    scores = np.array([shipped.score_turns(each.turns).value for each in dialogues])
    alone = np.array([shipped.score_turns(each.turns[-1:]).value for each in dialogues])
    hard = np.array([each.hard for each in dialogues])

    assert auc(scores, hard) >= 0.9
    assert auc(scores, hard) > auc(alone, hard) + 0.1


def test_a_turn_has_nearly_the_score_of_what_it_continues() -> None:
    _, dialogues = written("held_out")
    apart = [
        abs(shipped.score_turns(each.turns).value - shipped.score_turns(each.until_continued).value)
        for each in dialogues
        if each.continued is not None
    ]

    assert np.mean(np.array(apart) <= 0.1) >= 0.8


def test_what_is_only_measured_is_not_among_what_the_rules_were_tuned_on() -> None:
    replies, dialogues = written("held_out")
    known, known_dialogues = written("tune")

    for kind, texts in replies.items():
        assert not set(map(str.lower, texts)) & set(map(str.lower, known[kind]))
    asked = {each.turns[0].text for each in known_dialogues}
    assert not any(each.turns[0].text in asked for each in dialogues)


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    hard = np.array([True, True, False, False])

    assert auc(np.array([0.9, 0.8, 0.2, 0.1]), hard) == 1.0
    assert auc(np.array([0.9, 0.1, 0.2, 0.1]), hard) == pytest.approx(0.625)
    assert auc(np.array([0.5, 0.5, 0.5, 0.5]), hard) == 0.5


def test_the_session_of_a_dialogue_remembers_what_its_text_shows() -> None:
    _, dialogues = written("tune")
    follows = [each for each in dialogues if each.kind == "follow" and len(each.turns) == 3]

    near = [
        abs(by_session(shipped, each.turns).value - shipped.score_turns(each.turns).value) for each in follows
    ]

    assert np.mean(np.array(near) <= 0.05) >= 0.8
