"""The last turn of a conversation is scored in the light of the turns that it refers to, and of no others."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.routing.scoring import scorer
from headrace.routing.scoring.conversation import (
    CHARACTERS,
    TURNS,
    Carried,
    Earlier,
    Turn,
    row_of,
    turns_of_row,
    window,
)
from headrace.routing.scoring.score import Score
from headrace.routing.scoring.turns import reading
from headrace.routing.scoring.turns.pasted import question_in, turns_in
from headrace.routing.success.estimate import Estimate

shipped = scorer.load()

HARD = (
    "Prove that for all integers n, $n^3 - n$ is divisible by 6, and generalise it to every prime exponent."
)
EASY = "What is the capital of France?"
CODE = "Here it is:\n```python\ndef add(a, b):\n    c = a + b\n    return a\n```"
DOCUMENT = "The old bridge was begun by the town in 1891, and traders paid for most of the work. " * 40


def talk(*texts: str) -> list[Turn]:
    """Return turns of the user and the assistant by turns; "tool: ..." is a tool's."""
    turns = []
    for place, text in enumerate(texts):
        role = "tool" if text.startswith("tool: ") else "assistant" if place % 2 else "user"
        turns.append(Turn(role, text.removeprefix("tool: ")))
    return turns


def value(*texts: str) -> float:
    return shipped.score_turns(talk(*texts)).value


def features(score: Score) -> dict[str, float]:
    return {feature.name: feature.log_odds for feature in score.features}


FOLLOWS = [
    *("Yes", "go on", "Why?", "Now in German", "fix it", "And the second one?", "Do the same for n = 5"),
    *(
        "sure, please",
        "Can you explain that again?",
        "shorter please",
        "Sí, continúa",
        "Pourquoi ?",
        "weiter",
    ),
    *("sim", "продолжай", "继续", "हाँ", "لماذا؟", "হ্যাঁ", "جاری رکھیں", "続けて", "lanjutkan"),
]


@pytest.mark.parametrize("follow", FOLLOWS)
@pytest.mark.parametrize("topic", [HARD, EASY])
def test_a_turn_that_continues_another_has_nearly_its_score(topic: str, follow: str) -> None:
    score = shipped.score_turns(talk(topic, "Here is an answer.", follow))

    assert abs(score.value - value(topic)) < 0.1
    assert score.continues >= 0.5


@pytest.mark.parametrize(
    ("answer", "follow"),
    [
        ("Choose a coset of the subgroup and count its elements.", "which coset?"),
        ("By the lemma, the map is surjective.", "how is surjectivity used?"),
        ("So it is.", "talk me through the final inequality"),
        ("So it is.", "Nope. Maple finds another value."),
        ("So ist es.", "Und wenn n negativ ist?"),
        ("Así es.", "Y si n es negativo?"),
        ("Voilà.", "Peux-tu le rendre plus court ?"),
        ("Так.", "А если n отрицательное?"),
        ("如此。", "它为什么成立？"),
    ],
)
def test_a_turn_about_the_answer_continues(answer: str, follow: str) -> None:
    assert shipped.score_turns(talk(HARD, answer, follow)).continues >= 0.5


def test_the_next_task_is_scored_by_itself() -> None:
    task = "Now prove that every bounded monotone sequence of reals converges."

    assert shipped.score_turns(talk(EASY, "Paris.", task)).continues < 0.5


@pytest.mark.parametrize(
    "last",
    [
        *("kk, got it", "Magic! Have a great weekend", "thnx a lot", "sorted, ciao"),
        *(
            "Thanks!",
            "thank you so much, that helps",
            "ok bye",
            "Perfect.",
            "gracias",
            "谢谢",
            "धन्यवाद",
            "شكرا",
        ),
        *(
            EASY,
            "Who wrote Hamlet?",
            "By the way, how are you today?",
            "Different question: who won in 1998?",
        ),
        *("Thanks! What is the largest ocean?", "ok, now tell me a joke", "I want to visit the zoo"),
        *("sing me the alphabet", "what's the exchange rate"),
    ],
)
def test_thanks_and_other_topics_inherit_nothing(last: str) -> None:
    score = shipped.score_turns(talk(HARD, "Here is a proof.", last))

    assert score.continues < 0.5
    assert "turn:inherited" not in features(score)
    assert score.value < 0.5 < value(HARD)


def test_a_hard_topic_after_an_easy_one_is_hard() -> None:
    assert abs(value(EASY, "Paris.", HARD) - value(HARD)) < 0.02


def test_what_is_inherited_decays_from_turn_to_turn() -> None:
    scores = [value(HARD, *("So it is.", "go on") * count) for count in range(6)]

    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    assert scores[-1] > scores[0] - 0.1


def test_after_thanks_a_turn_continues_what_was_before() -> None:
    thanked = value(HARD, "Here is a proof.", "Thanks!", "You are welcome.", "And the second case?")

    assert abs(thanked - value(HARD)) < 0.1


def test_ok_is_consent_after_a_question_and_thanks_after_an_answer() -> None:
    assert value(HARD, "Here is a sketch. Shall I write it out?", "ok") > 0.5
    assert value(HARD, "Here is the proof.", "ok") < 0.5


def test_a_follow_up_that_asks_for_more_than_what_it_continues_is_scored_by_itself() -> None:
    asked = "Now write a Python function that computes it for every country, with tests and error handling."

    assert value(EASY, "Paris.", asked) > value(EASY) + 0.15


@pytest.mark.parametrize("correction", ["That's wrong.", "no, you made a mistake", "It still doesn't work"])
def test_a_correction_raises_the_score(correction: str) -> None:
    corrected = shipped.score_turns(talk(HARD, "Here is a proof.", correction))

    assert features(corrected)["turn:correction"] > 0
    assert value(HARD, "Here is a proof.", "go on") < corrected.value < value(HARD) + 0.1


def test_the_same_question_again_raises_the_score() -> None:
    again = shipped.score_turns(talk(HARD, "I cannot do that.", HARD))

    assert features(again)["turn:repeated"] > 0
    assert again.value > value(HARD)


def test_errors_of_tools_raise_the_score_and_more_of_them_more() -> None:
    request, error = "Fix the build of our project.", "error[E0308]: mismatched types, exit code 101"
    scores = [
        shipped.score_turns([Turn("user", request), *[Turn("tool", text) for text in results]]).value
        for results in (["ok"], [error], [error, error])
    ]

    assert scores == sorted(set(scores))
    results = [Turn("user", request), Turn("assistant", "I try."), Turn("user", f"Tool result: {error}")]
    assert shipped.score_turns(results).value > value(request), "also if a caller has no role for tools"
    other = shipped.score_turns([Turn("user", HARD), Turn("tool", error), Turn("user", EASY)])
    assert other.value == pytest.approx(value(EASY)), "another topic did not fail"


def test_fix_it_after_code_is_a_question_about_code() -> None:
    code = shipped.score_turns(talk("Can you show it to me?", CODE, "fix it"))

    assert features(code)["turn:code"] > 0
    assert code.value > value("Can you show it to me?", "Here it is.", "fix it") + 0.1


def test_the_systems_turns_are_left_out() -> None:
    system = Turn("system", "You are a mathematician. " + HARD)

    assert shipped.score_turns([system, Turn("user", EASY)]) == shipped.score_turns([Turn("user", EASY)])


@pytest.mark.parametrize(
    "wrapped",
    [
        "You are a helpful assistant that never lies.\n\n{}",
        "You are an expert tutor. Answer briefly.\n\nQ: What is 2 + 2?\nA: 4\n\nQ: {}\nA:",
        "Question: Who was Ada Lovelace?\nAnswer: A mathematician.\nQuestion: {}\nAnswer:",
        "User: Prove that there are infinitely many primes.\nAssistant: Sure: ...\nUser: {}\nAssistant:",
        "<|im_start|>system\nYou prove theorems.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n",
    ],
)
@pytest.mark.parametrize("question", [EASY, HARD])
def test_what_was_pasted_before_the_question_is_left_out(wrapped: str, question: str) -> None:
    assert abs(value(wrapped.format(question)) - value(question)) < 0.02


def test_a_pasted_conversation_is_read_like_one() -> None:
    pasted = f"User: {HARD}\nAssistant: Here is a sketch. Shall I write it out?\nUser: yes"

    assert abs(value(pasted) - value(HARD, "Here is a sketch. Shall I write it out?", "yes")) < 1e-9


@pytest.mark.parametrize(
    "text",
    [
        "You are given an array of integers.\n\nReturn the largest sum of a subarray in linear time.",
        "You are a grumpy innkeeper. A traveller asks for a room. Stay in character.",
        "You are an expert coach. Please write a plan for a marathon.\n\nI train six days a week.",
        "Explain this:\nInput: [1, 2]\nOutput: 3\nInput: [4]\nOutput: 4",
        "Model: X200\nUser: the buyer of the device. Which guarantee does the user have?",
        EASY,
    ],
)
def test_texts_that_only_look_like_a_role_or_examples_are_left_whole(text: str) -> None:
    assert question_in(text).text == text
    assert turns_in(text) == []


@pytest.mark.parametrize("asked", ["In which year was the bridge begun?", HARD])
def test_of_a_long_document_the_question_at_either_end_counts(asked: str) -> None:
    question = f"{asked} Use the text below."
    scores = [
        value(f"{question}\n\n{DOCUMENT}"),
        value(f"{DOCUMENT}\n\n{question.replace('below', 'above')}"),
        value(f"{question}\n\n{DOCUMENT.upper() * 2}"),
    ]

    assert max(scores) - min(scores) < 0.1
    assert abs(scores[0] - value(question)) < 0.1
    assert features(shipped.score_turns(talk(f"{question}\n\n{DOCUMENT}")))["turn:document"] > 0


texts = st.sampled_from(
    [HARD, EASY, CODE, "yes", "Thanks!", "fix it", "why?", "That's wrong.", "go on"]
) | st.text(max_size=60)
any_turns = st.lists(
    st.builds(Turn, st.sampled_from(["system", "user", "assistant", "tool", "robot"]), texts),
    min_size=1,
    max_size=25,
)
any_earlier = st.none() | st.builds(
    Earlier, st.floats(0, 1), st.just("large"), st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple)
)


@given(any_turns, any_earlier)
def test_the_score_of_a_conversation_is_in_range_and_its_shares_add_up(
    turns: list[Turn], earlier: Earlier | None
) -> None:
    score = shipped.score_turns(turns, earlier)

    assert 0 < score.value < 1
    assert 0 <= score.continues <= 1
    log_odds = score.bias + sum(feature.log_odds for feature in score.features)
    assert math.isclose(math.log(score.value / (1 - score.value)), log_odds, abs_tol=1e-6)
    assert shipped.score_turns(window(reversed(turns)), earlier) == score, "the window is enough"


# Code in an answer is not remembered.
@given(st.lists(texts.filter(lambda text: bool(text.strip()) and "```" not in text), min_size=1, max_size=6))
def test_the_memory_of_a_session_stands_for_the_turns_that_were_not_sent(asked: list[str]) -> None:
    turns: list[Turn] = []
    earlier: Earlier | None = None
    for text in asked:
        turns += [Turn("user", text), Turn("assistant", "So it is.")]
        by_memory = shipped.score_turns([Turn("user", text)], earlier)
        whole = shipped.score_turns(turns[:-1])
        if (carried := by_memory.carried) is not None:
            earlier = Earlier(carried.score, "", carried.words)

    assert by_memory.value == pytest.approx(whole.value, abs=0.02)


@given(any_turns)
def test_the_window_is_bounded(turns: list[Turn]) -> None:
    found = window(reversed([*turns, *[Turn("assistant", "x" * 3_000)] * 3]))

    assert len(found) <= TURNS + 1
    assert sum(len(turn.text) for turn in found) <= CHARACTERS + 4_001


def test_only_the_turns_of_the_window_are_taken() -> None:
    taken = 0

    def newest_first() -> Iterator[Turn]:
        nonlocal taken
        for place in range(4_096):
            taken += 1
            yield Turn("user" if place % 2 == 0 else "assistant", "word " * 10)

    window(newest_first())

    assert taken <= TURNS + 1


def test_the_users_last_turn_is_read_however_many_turns_of_tools_follow_it() -> None:
    turns = [Turn("user", HARD), *[Turn("tool", "ok")] * 100]

    assert shipped.score_turns(turns).value == pytest.approx(value(HARD))


def test_the_middle_of_a_huge_turn_changes_nothing() -> None:
    def huge(word: str) -> list[Turn]:
        return talk(
            "a " * 3_000 + word * 1_000_000 + " b" * 3_000, "c " * 3_000 + word * 10_000 + " d" * 900, "go on"
        )

    assert shipped.score_turns(huge("x")) == shipped.score_turns(huge("y"))


def test_estimates_of_tiers_are_inherited_like_the_score() -> None:
    def scored(text: str) -> Score:
        good = 0.1 if text == HARD else 0.9
        return Score(0.7 if text == HARD else 0.2, 0.0, estimates={"small": Estimate(good, 100.0)})

    turns = talk(HARD, "Here is a proof.", "go on")
    whole = reading.score_turns(scored, turns)
    carried = reading.score_turns(scored, turns[:1]).carried
    assert carried is not None
    remembered = reading.score_turns(
        scored, turns[-1:], Earlier(0.7, "large", carried.words, carried.estimates)
    )

    assert whole.estimates["small"].good < 0.2
    assert whole.estimates == remembered.estimates


def test_thanks_are_not_remembered() -> None:
    assert shipped.score_turns(talk(HARD, "Here is a proof.", "Thanks!")).carried is None
    assert isinstance(shipped.score_turns(talk(HARD)).carried, Carried)


def test_rows_keep_the_turns() -> None:
    assert row_of(talk(EASY)) == {"prompt": EASY}
    assert turns_of_row(row_of(talk(HARD, "Here.", "go on"))) == talk(HARD, "Here.", "go on")
    rows: list[dict[str, object]] = [{}, {"prompt": 1}, {"messages": []}, {"messages": [{"role": "user"}]}]
    for broken in rows:
        with pytest.raises(ValueError, match=r"prompt|messages"):
            turns_of_row(broken)


def test_the_roles_of_rows_are_known() -> None:
    def row(*roles: str) -> dict[str, object]:
        return {"messages": [{"role": role, "content": "a"} for role in roles]}

    known = turns_of_row(row("developer", "user", "function"))
    assert [turn.role for turn in known] == ["system", "user", "tool"]
    with pytest.raises(ValueError, match=r"messages\[1\]\.role is 'usr', must be one of system, user"):
        turns_of_row(row("user", "usr"))
    with pytest.raises(ValueError, match="either 'prompt' or 'messages'"):
        turns_of_row(row("user") | {"prompt": "a"})
