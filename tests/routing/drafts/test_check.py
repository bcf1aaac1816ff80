"""A draft is checked for the problems that a reader would notice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.routing.artifact import BadArtifact
from headrace.routing.drafts import check as draft_check
from headrace.routing.drafts.features import FEATURES
from headrace.routing.drafts.rules import CascadeRules

checker = draft_check.load()

EGGS = (
    "Janet has 3 boxes with 12 eggs each. She eats 5 eggs and sells the rest for $2 each. "
    "How many dollars does she make?"
)
RIGHT = "She has 3 * 12 = 36 eggs. 36 - 5 = 31. She makes 31 x $2 = $62.\n#### 62"


def good(
    draft: str,
    *,
    prompt: str = EGGS,
    finished: bool = True,
    logprobs: list[float] | None = None,
    samples: list[str] | None = None,
) -> float:
    return checker.check(prompt, draft, finished=finished, logprobs=logprobs, samples=samples or ()).good


@pytest.mark.parametrize(
    ("draft", "reason"),
    [
        (RIGHT.replace("36 eggs", "35 eggs"), "wrong_equation"),
        (RIGHT.replace("#### 62", "#### 57"), "answer_unsupported"),
        ("The answer is 62. " + RIGHT.replace("#### 62", "#### 26"), "answers_differ"),
        ("I'm sorry, there is not enough information to tell.", "refusal"),
        ("She has 3 * 12 = 36 eggs, and after breakfast she still", "no_answer"),
        (RIGHT.replace("36 - 5", "Wait, that is a mistake. 36 - 5"), "second_thoughts"),
        ("She has no eggs left to sell at all.", "no_number"),
        ("", "empty"),
    ],
)
def test_each_problem_lowers_the_probability_and_is_named(draft: str, reason: str) -> None:
    verdict = checker.check(EGGS, draft, finished=True)

    assert verdict.good < good(RIGHT)
    assert FEATURES[reason] in verdict.reasons


def test_an_answer_that_was_cut_off_is_worth_less_than_the_same_answer_finished() -> None:
    assert good(RIGHT, finished=False) < good(RIGHT)


def test_only_the_answer_is_checked_if_a_draft_continues_with_another_question() -> None:
    onward = RIGHT + "\n\nQuestion: Tom has 4 pens and buys 5. How many has he?\nAnswer: 4 + 5 = 10. #### 10"

    verdict = checker.check(EGGS, onward, finished=True)

    assert verdict.reasons == (FEATURES["runs_on"],)
    assert good("She has none. #### 0\nQuestion: 1 + 1?\nAnswer: #### 2") < verdict.good < good(RIGHT)


def test_unlikely_tokens_lower_a_draft_and_likely_ones_raise_it() -> None:
    assert good(RIGHT, logprobs=[-2.0] * 30) < good(RIGHT) < good(RIGHT, logprobs=[-0.01] * 30)


def test_log_probabilities_with_nan_are_ignored() -> None:
    assert good(RIGHT, logprobs=[-0.1, math.nan]) == good(RIGHT)
    assert good(RIGHT, logprobs=[-math.inf]) < good(RIGHT)


def test_code_that_does_not_parse_is_not_good_enough() -> None:
    prompt = "Write a Python function that doubles a number."
    whole = "```python\ndef double(x):\n    return 2 * x\n```"

    def sure(draft: str) -> float:
        return good(draft, prompt=prompt, logprobs=[-0.01] * 20)

    assert sure(whole.replace("(x):", "(x:")) < CascadeRules().min_quality < sure(whole)


@pytest.mark.parametrize("logprobs", [None, [-0.1] * 30])
def test_samples_that_agree_raise_a_draft_above_samples_that_differ(logprobs: list[float] | None) -> None:
    other = RIGHT.replace("62", "57")

    def with_samples(*samples: str) -> float:
        return good(RIGHT, logprobs=logprobs, samples=list(samples))

    assert with_samples(other, other) < with_samples(RIGHT, other) < with_samples(RIGHT, "She makes $62.")


def test_samples_that_cannot_be_compared_change_nothing() -> None:
    assert good(RIGHT, samples=["", "  "]) == good(RIGHT)


def test_no_finding_against_a_draft_raises_its_probability() -> None:
    content = json.loads(draft_check.SHIPPED.read_text())

    for evidence in draft_check.EVIDENCE:
        weights = content["evidence"][evidence]["weights"]
        assert weights.pop("samples_agree") >= 0
        assert all(weight <= 0 for weight in weights.values()), evidence


@given(
    st.text(max_size=300),
    st.text(max_size=600),
    st.booleans(),
    st.none() | st.lists(st.floats(-30, 0), max_size=5),
    st.lists(st.text(max_size=100), max_size=2),
)
def test_any_text_gets_a_probability_that_its_log_odds_add_up_to(
    prompt: str, draft: str, finished: bool, logprobs: list[float] | None, samples: list[str]
) -> None:
    verdict = checker.check(prompt, draft, finished=finished, logprobs=logprobs, samples=samples)

    assert 0 < verdict.good < 1
    log_odds = verdict.bias + sum(feature.log_odds for feature in verdict.features)
    assert math.isclose(math.log(verdict.good / (1 - verdict.good)), log_odds, abs_tol=1e-6)
    assert all(0 <= feature.value <= 1 for feature in verdict.features)
    assert verdict == checker.check(prompt, draft, finished=finished, logprobs=logprobs, samples=samples)


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"format": 1, "kind": "draft_check"})])
def test_a_file_that_is_not_a_check_is_rejected_with_its_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "check.json"
    path.write_text(content)

    with pytest.raises(BadArtifact, match=r"check\.json"):
        draft_check.load(path)


def test_weights_that_are_not_finite_are_rejected(tmp_path: Path) -> None:
    content = json.loads(draft_check.SHIPPED.read_text())
    content["evidence"]["text"]["weights"]["refusal"] = math.nan
    path = tmp_path / "check.json"
    path.write_text(json.dumps(content))

    with pytest.raises(BadArtifact, match="not all finite"):
        draft_check.load(path)


def test_only_the_beginning_of_long_drafts_and_samples_is_read() -> None:
    """The router waits for the check."""
    long = "It is 62. " * 3000

    assert checker.check(EGGS, RIGHT, samples=[long]) == checker.check(EGGS, RIGHT, samples=[long[:10_000]])


def test_a_huge_number_is_checked_like_any_other() -> None:
    """Small models fall into loops."""
    assert good(f"She sells {'9' * 400}", prompt="How many eggs does she sell?") < 0.5


RUNS = ["\n" * 20_000, "```" + "\n" * 20_000, " 1 =" + " " * 20_000]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("long", RUNS)
def test_long_runs_of_one_thing_take_no_longer_than_other_text(long: str) -> None:
    """It takes milliseconds. A backtracking pattern would take seconds, and the router waits for it."""
    for prompt, draft in (
        (f"How many?{long}.", "7"),
        (EGGS, f"She{long}."),
        ("Which?\nA) x\nB) y", f"It{long}."),
    ):
        assert 0 <= good(draft, prompt=prompt, samples=[draft]) <= 1
    assert 0 <= good(f"{long}.", prompt="Write a function.") <= 1
