"""The shipped scorer: log-odds that add up, a sensible order, and clear errors for unusable files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.routing.artifact import BadArtifact
from headrace.routing.scoring import normal, prompt_features, scorer, words

shipped = scorer.load()

EASY = [
    "Hello!",
    "Thanks a lot",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Pretend to be a pirate and greet me.",
]
HARD = [
    "Prove that for all integers n, $n^3 - n$ is divisible by 6.",
    "Find all real solutions of the equation x^4 - 5x^2 + 4 = 0.",
    "Write a Python function that finds the median of two sorted arrays in O(log n) and explain its "
    "complexity.",
    "A train leaves at 9:40 and travels 180 km at 72 km per hour, then stops for 15 minutes and goes on at "
    "twice the speed for 90 km. How many minutes does the whole trip take, and when does it arrive?",
]


# Requests of a chat by what they ask for; by what is published, large models lead much in the first four.
CHAT = {
    "mathematics": [
        "The sum of two numbers is 31 and their difference is 7. What are the numbers?",
        "What is the area of a triangle with the corners (1, 2), (4, 6) and (7, 2)?",
        "Two dice are thrown. What is the probability that their product is even?",
    ],
    "coding": [
        "Write a Python function that checks whether a string is a palindrome, ignoring punctuation.",
        "How do I reverse a singly linked list? Show code in C++.",
        "Given an array of integers, write a program to find the longest increasing subsequence.",
    ],
    "reasoning": [
        "Tom is taller than Ann, and Ann is taller than Raj. Is Raj shorter than Tom? Explain.",
        "Which of these does not belong with the others, and why: apple, banana, carrot, cherry?",
        "Every time the rooster crows the sun comes up soon after. Does the rooster cause the sunrise?",
    ],
    "extraction": [
        "From this paragraph, list every date and what happened on it as a table: The bridge was begun in "
        "1921, opened on 3 May 1925 and closed for repair in 1988.",
        "Extract the names of all people and companies from the text below and return them as JSON.\n"
        "Yesterday Maria Lopez of Nordwind met Jan Peters, who runs Alta Foods, to talk about a merger.",
    ],
    "roleplay": [
        "You are a grumpy medieval innkeeper. A traveller asks for a room. Stay in character.",
        "Imagine you are the last dinosaur. Write a diary entry about what you saw today.",
    ],
    "writing": [
        "Write a cover letter for a junior librarian who is changing careers after ten years as a nurse.",
        "Could you write an opening paragraph for a mystery novel that takes place on a night train?",
    ],
    "explaining": [
        "How did the printing press change European society?",
        "Please explain what an enzyme is and how temperature affects its activity.",
    ],
    "chores": [
        "Translate 'Where is the station?' into Spanish.",
        "Correct the spelling: I recieved teh letter yesterday.",
        "Summarize the following email in two bullet points.\nHi all, the meeting moves to Tuesday at ten.",
        "How are you today?",
    ],
}


@given(st.text(max_size=2000))
def test_the_score_is_in_range_and_its_shares_add_up(text: str) -> None:
    score = shipped.score(text)

    assert 0 < score.value < 1
    log_odds = score.bias + sum(feature.log_odds for feature in score.features)
    assert math.isclose(math.log(score.value / (1 - score.value)), log_odds, abs_tol=1e-9)
    assert all(0 <= feature.value <= 1 for feature in score.features)


@given(st.text(max_size=300))
def test_the_same_text_has_the_same_score(text: str) -> None:
    assert shipped.score(text) == scorer.load().score(text)


def test_small_talk_facts_and_play_score_below_mathematics_code_and_long_word_problems() -> None:
    assert max(shipped.score(text).value for text in EASY) < 0.5
    assert min(shipped.score(text).value for text in HARD) > 0.5
    assert max(shipped.score(text).value for text in EASY) < min(shipped.score(text).value for text in HARD)


def test_more_right_answers_are_expected_where_large_models_lead() -> None:
    correct = scorer.load(objective="correctness")
    means = {
        asks: sum(correct.score(text).value for text in prompts) / len(prompts)
        for asks, prompts in CHAT.items()
    }

    leads = {"mathematics", "coding", "reasoning", "extraction"}
    assert min(means[asks] for asks in leads) > max(means[asks] for asks in means.keys() - leads)


def test_open_requests_score_above_chores_because_people_prefer_the_larger_model() -> None:
    means = {asks: sum(map(value, prompts)) / len(prompts) for asks, prompts in CHAT.items()}

    assert min(means["writing"], means["explaining"]) > 0.55
    assert max(map(value, CHAT["chores"])) < 0.55
    assert means["chores"] < 0.4


def test_the_objective_changes_open_requests_and_leaves_checked_ones() -> None:
    scorers = [scorer.load(objective=objective) for objective in ("correctness", "both", "preference")]
    wish = "Write a cover letter for a junior librarian who is changing careers."
    choices = "Which gas do plants take in?\nA. oxygen\nB. carbon dioxide\nC. helium\nD. argon"

    low, middle, high = (each.score(wish).value for each in scorers)
    assert low + 0.2 < middle < high - 0.05
    checked = [each.score(choices).value for each in scorers]
    assert max(checked) - min(checked) < 0.01


def value(text: str) -> float:
    return shipped.score(text).value


def test_a_word_problem_with_more_quantities_and_clauses_scores_higher() -> None:
    short = "Ann has 3 bags of 12 apples. How many apples does she have?"
    long = (
        "Ann has 3 bags of 12 apples and twice as many pears. She gives a third of the apples to each of two "
        "neighbours, sells half of the pears for $2 each and buys five more bags. How many apples and pears "
        "does she have, and how much more money than before?"
    )

    assert shipped.score(long).value > shipped.score(short).value + 0.1


def test_lines_that_begin_with_a_name_and_a_colon_are_not_choices() -> None:
    assert prompt_features.options("Compare them. A: revenue 10, costs 7; B: revenue 9, costs 5.") == []


# Fragments of texts in which patterns match, begin to match, or overlap.
FRAGMENTS = (
    *(
        "A) red",
        "(B) blue",
        "a. x",
        "b: y",
        "C. z",
        "\n",
        " ",
        "\n- item",
        "1) ",
        "__",
        "....",
        "…",
        "x",
        "it's",
        "’",
    ),
    *(
        "\\frac",
        "$x$",
        "^2",
        "=",
        "≤",
        "1/2",
        "5 %",
        "3.5",
        "$ 5",
        "€3",
        "```",
        "def f(x)",
        "f()",
        "SELECT",
        "</a",
    ),
    *(
        "#include()",
        "{\n",
        "}; \n",
        "=>",
        "!=",
        "NOT",
        "EXCEPT",
        "statement 1",
        "I and II",
        "III",
        "Only I",
        "act ",
    ),
)
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=30).map("".join)


@given(texts)
def test_a_text_without_the_literals_of_a_pattern_has_no_match(text: str) -> None:
    measured = prompt_features.measure(text)

    for name, (pattern, full) in prompt_features._PATTERNS.items():
        assert measured[name] == min(len(pattern.regex.findall(text)), full) / full, name


@given(texts)
def test_a_text_without_the_literals_of_choices_has_none(text: str) -> None:
    for pattern in prompt_features._OPTIONS:
        letters = [letter for letter, _ in pattern.regex.findall(text)]
        two = "a" in letters and "b" in letters
        assert not two or list(pattern.matches(text))


@given(texts | st.text("aZ'’é1_ .", max_size=30))
def test_words_in_ascii_are_found_like_all_others(text: str) -> None:
    assert words.words_of(text) == words._WORD.findall(text)


def test_a_huge_prompt_is_scored_by_its_beginning_and_its_end() -> None:
    text = "word " * 4000

    assert shipped.score(text + "x " * 1_000_000 + text) == shipped.score(text + "y " * 1_000_000 + text)


@pytest.mark.parametrize(
    "wrapped",
    [
        "Question: {}\nAnswer:",
        "Answer the following question:\n{}",
        "{}\nLet's think step by step.",
        "The following are multiple choice questions (with answers) about physics.\n\n{}\nAnswer:",
    ],
)
def test_text_that_applications_put_around_a_question_does_not_change_its_score(wrapped: str) -> None:
    text = "Which planet has the longest year?\nA. Mars\nB. Venus\nC. Neptune\nD. Earth"

    assert shipped.score(wrapped.format(text)) == shipped.score(text)


@pytest.mark.parametrize(
    "text",
    [
        "Pick one.\nA. red\nB. blue\nC. green",
        "Pick one. (A) red (B) blue (C) green",
        "Pick one.\nA) red\nB) blue",
    ],
)
def test_choices_are_found_in_any_layout(text: str) -> None:
    assert len(prompt_features.options(normal.question(text))) >= 2
    kinds = {share.name: share.value for share in shipped.score(text).features if "kind:" in share.name}
    assert max(kinds, key=lambda kind: kinds[kind]) == "kind:choices"


def test_lists_and_initials_are_not_choices() -> None:
    assert prompt_features.options("Plan B. It was J. R. who said A. Smith is here.") == []


def test_no_network_model_or_gpu_library_is_loaded_to_score() -> None:
    code = (
        "import sys; from headrace.routing.scoring import scorer; "
        "from headrace.routing.drafts import check as draft_check; "
        "scorer.load().score('Hi'); draft_check.load().check('a', 'b'); "
        "print(sorted({'torch', 'transformers', 'grpc', 'sklearn'} & set(sys.modules)))"
    )

    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert told.stdout.strip() == "[]"


def test_a_saved_model_gives_the_same_scores(tmp_path: Path) -> None:
    scorer.save(shipped.model, tmp_path / "scorer.json")

    again = scorer.load(tmp_path / "scorer.json")

    assert all(again.score(text) == shipped.score(text) for text in EASY + HARD)


def test_unusable_artifacts_are_rejected_with_their_name_and_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    content = json.loads(scorer.SHIPPED.read_text())

    def with_each(name: str, value: object) -> str:
        kinds = {kind: part | {name: value} for kind, part in content["kinds"].items()}
        return json.dumps(content | {"kinds": kinds})

    for broken, cause in [
        ("", "mine.json"),
        ("[" * 100_000, "mine.json"),
        (json.dumps(content | {"kinds": list(content["kinds"].values())}), "mine.json"),
        (with_each("gate", 0.5), "do not have the shape"),
        (with_each("head", 0.5), "do not have the shape"),
        (with_each("head_bias", [[0.5]]), "do not have the shape"),
        ("[]", "not a scorer"),
        (json.dumps(content | {"format": 99}), "not a scorer of format"),
        (json.dumps(content | {"features": ["length"]}), "other features"),
        (json.dumps(content | {"kinds": {}}), "weights"),
        (json.dumps(content | {"steepness": math.nan}), "not all finite"),
        (json.dumps(content | {"centre": math.inf}), "not all finite"),
    ]:
        path.write_text(broken)
        with pytest.raises(BadArtifact, match=cause):
            scorer.load(path)
    with pytest.raises(BadArtifact, match="nowhere"):
        scorer.load(tmp_path / "nowhere")


def test_the_shipped_artifacts_are_small() -> None:
    assert sum(path.stat().st_size for path in scorer.SHIPPED.parent.iterdir()) < 2_000_000
