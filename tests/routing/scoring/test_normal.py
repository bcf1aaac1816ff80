"""What a prompt asks for is found in many ways to write it, and content is never removed with its framing."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.routing.rewritings import SEEN
from headrace.routing.scoring import normal, scorer

shipped = scorer.load()

PROMPTS = [
    "What is the capital of France?",
    "Prove that the square root of 2 is irrational.",
    "Write a Python function that merges two sorted lists.",
    "Tom has 5 apples and buys 7 more. He gives 3 to Ann. How many apples does he have left?",
    "Which gas do plants absorb?\nA. Oxygen\nB. Carbon dioxide\nC. Nitrogen\nD. Helium",
    "Write a short story about a lighthouse keeper who finds a map.",
]
FRAMES = [
    "Hi! {}",
    "I hope you are well. I have a question for you. {}",
    "Could you please help me with this: {}",
    "{}\n\nThank you very much in advance!\nBest regards,\nSam",
    "{} Please answer carefully.",
    "**Question:** {}",
    "> {}",
    "```text\n{}\n```",
    "<prompt>\n{}\n</prompt>",
    "Bonjour ! {} Merci d'avance.",
    "你好！{} 谢谢！",
    'Hello,\n\n"{}"\n\nThanks!',
]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_framing_does_not_change_a_score(frame: str, prompt: str) -> None:
    assert abs(shipped.score(frame.replace("{}", prompt)).value - shipped.score(prompt).value) < 0.01


@pytest.mark.parametrize("prompt", PROMPTS)
def test_case_line_breaks_and_white_space_do_not_change_a_score(prompt: str) -> None:
    value = shipped.score(prompt).value

    assert shipped.score(prompt.upper()).value == value
    assert shipped.score(prompt.lower()).value == value
    assert shipped.score("\n" + prompt.replace(" ", "  ").replace("\n", "\n\n") + " \n").value == value
    assert shipped.score(prompt.replace(" and ", " and\n")).value == pytest.approx(value, abs=0.01)


@pytest.mark.parametrize("name", SEEN)
def test_a_harmless_rewriting_hardly_changes_a_score(name: str) -> None:
    """The benchmark `perturb` measures this on 1,200 prompts; here a few show that each kind is handled."""
    rng = random.Random(3)
    changes = [
        abs(shipped.score(SEEN[name](prompt, rng)).value - shipped.score(prompt).value)
        for prompt in PROMPTS
        for _ in range(3)
    ]

    assert sum(changes) / len(changes) < 0.02


@pytest.mark.parametrize(
    "layout",
    ["{}) ", "({}) ", "{}: ", "[{}] ", "- {}. ", "* {}) ", "Option {}: ", "**{}.** ", "{} - ", "- "],
)
def test_choices_are_the_same_in_every_layout(layout: str) -> None:
    lines = zip("ABCD", ["Oxygen", "Carbon dioxide", "Nitrogen", "Helium"], strict=True)
    text = "Which gas do plants absorb?" + "".join("\n" + layout.format(mark) + gas for mark, gas in lines)

    expected = "which gas do plants absorb?\na) oxygen\nb) carbon dioxide\nc) nitrogen\nd) helium"
    assert normal.question(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Hello!",
        "Thank you very much!",
        "Can you help me?",
        "Hi! How are you?",
        "Question:",
        "Please answer carefully.",
        "Bonjour !",
        "谢谢！",
    ],
)
def test_a_prompt_of_framing_alone_stays(text: str) -> None:
    assert normal.question(text)


@pytest.mark.parametrize(
    "text",
    [
        "You are a pirate. Greet me.",
        "Explain why. Then prove it.",
        "What time is it in Tokyo when it is noon in Rome?",
        "I own a bakery and my costs rise. What should I do?",
        "Fix this: x = [1, 2",
        "Ann has 3 cats. Ben has 4.",
        "2**3 + 4**5 = ?",
    ],
)
def test_content_stays(text: str) -> None:
    kept = normal.question(text)

    assert kept.replace("\n", " ").strip(".?! ") == text.lower().strip(".?! ")


def test_contractions_are_read_like_their_long_forms() -> None:
    assert normal.question("What's new? It isn't, I'm sure, what you’d say.") == normal.question(
        "What is new? It is not, I am sure, what you would say."
    )


@given(st.text(max_size=400))
def test_the_normal_form_of_a_text_is_in_one_case_and_not_empty(text: str) -> None:
    found = normal.question(text)

    assert found == found.lower()
    assert found or not any(map(str.isalnum, text))


# Texts that regular expressions could read again and again.
ADVERSE = (
    *(
        "*a ",
        "_a ",
        "**",
        "'a",
        "- ",
        "a\n",
        "hello! ",
        "hello, ",
        "q: ",
        "证明",
        "お願い",
        "ก",
        "شكرا ",
        "नमस्ते ",
    ),
    *(
        "\u0300",
        "😀",
        " ",
        "1,",
        "(",
        "<a>",
        "a) b\n",
        ".",
        "?! ",
        "please ",
        "you are a expert ",
        "=",
        "```\n",
    ),
    *("{}; \n", "\\a$", "select ", "best regards ", "İ", "대", "x^", "i am you. "),
)


@pytest.mark.parametrize("part", ADVERSE)
def test_the_time_for_a_text_is_bounded_however_long_it_is(part: str) -> None:
    """Four thousand characters are read; reading them again and again would take seconds."""
    began = time.thread_time()
    shipped.score(part * (1_000_000 // len(part)))

    assert time.thread_time() - began < 0.5


@pytest.mark.parametrize(
    "opening",
    [
        "Thanks for your help. I need an answer to this. Please read it with care. It is hard. Thanks. ",
        "I have been struggling with this for a while. ",
        "Happy Monday! ",
        "You are a helpful assistant. ",
        "Sorry to bother you, but ",
        "First of all, thank you for all your help so far. ",
    ],
)
def test_openings_are_removed_as_a_whole(opening: str) -> None:
    assert normal.question(opening + PROMPTS[0]) == normal.question(PROMPTS[0])


def test_at_most_two_remarks_without_content_are_removed() -> None:
    """A story that begins with plain sentences is not eaten up."""
    story = "I was gone. You were gone. We were gone. They were gone. What happened to them?"

    assert normal.question(story).startswith("we were gone.")
