"""Prior knowledge about the kinds of prompts: their typical gain, and prompts of kinds without labelled rows.

These values are set by hand from published figures, because no labelled rows with a suitable licence exist:

- The gain of GPT-4 over Mixtral-8x7B: MMLU about 0.13, GSM8K about 0.22 (RouteLLM, arXiv 2406.18665);
  open instructions more, because there the larger model is preferred in most comparisons and not only where
  the smaller one is wrong (AlpacaEval's public leaderboard); competition mathematics still more; puzzles
  between word problems and those.
- In open-ended chat, large models lead small ones most in mathematics, coding, reasoning and extraction, and
  hardly in writing, roleplay and the humanities (MT-Bench by category: Zheng et al., arXiv 2306.05685,
  section 4.3).

The open-ended prompts, the puzzles and the mathematics questions below are ours, made from templates. The
gate is fitted to them.
"""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).with_name("requests.jsonl")

KINDS = (
    *("choices", "word_problem", "mathematics", "code", "reasoning", "fact", "passage"),
    *("open", "chore", "talk", "unclear"),
)

# The typical gain of each kind.
TYPICAL = {
    "choices": 0.13,
    "word_problem": 0.23,
    "mathematics": 0.29,
    "code": 0.22,
    "reasoning": 0.24,
    "fact": 0.07,
    "passage": 0.14,
    "open": 0.20,
    "chore": 0.10,
    "talk": 0.0,
    "unclear": 0.20,  # the middle of the traffic
}

# The same where people compare two answers and neither is wrong. There the stronger of two models is
# preferred about three times in four, so the gain is 0.5. The level of open requests is higher, because the
# gate is unsure: it gives one of an unseen author that kind with about half of the probability.
PREFERRED = {"open": 0.7, "chore": 0.15}

# Gain per feature at full strength where the language is not known: length and structure are left.
UNCLEAR = {"length": 0.1, "numbers": 0.04, "latex": 0.06, "symbols": 0.04, "syntax": 0.06}

# Longer prompts gain more: that held in nearly every measured family. This is the gain per unit of the
# feature, which grows by one from 5 to 500 words. Every head starts from it, and few labels change it.
LONGER = {"length": 0.3}

# The effect is smaller in competition mathematics, where the strong tier fails on long problems too, and in
# code, where a short request may ask for much.
LONGER_LITTLE = {"length": 0.1}

# Gain per feature at full strength within open-ended chat, in addition to length.
OPEN = {
    "mathematics": 0.08,
    "numbers": 0.05,
    "latex": 0.06,
    "symbols": 0.05,
    "variables": 0.03,
    "how_many": 0.05,
    "comparison": 0.04,
    "programming": 0.10,
    "syntax": 0.06,
    "reasoning": 0.09,
    "relations": 0.04,
    "conditions": 0.03,
    "extraction": 0.03,
    "length": 0.12,
    "long_words": 0.03,
    "questions": 0.02,
    "list_items": 0.02,
    "fractions": 0.03,
    "creative": -0.07,
    "roleplay": -0.04,
    "persona": -0.04,
    "advice": -0.05,
    "first_person": -0.02,
    "transformation": -0.06,
    "humanities": -0.04,
    "fact": -0.02,
    "analysis": -0.01,
    "you": -0.01,
}

# The same where people compare two answers: what the request is about hardly matters.
OPEN_PREFERRED = {"length": 0.12}

# Chores are short tasks on a text that the request contains (translate, correct, shorten) and one-line texts.
CHORE = {"length": 0.1, "programming": 0.1, "mathematics": 0.05}
TALK = {"length": 0.1}

# Gain per feature at full strength within plain questions, in addition to length.

ASKS_MORE = {"reasoning": 0.08, "comparison": 0.08, "conditions": 0.03, "programming": 0.1}

_TOPICS = (
    "a lighthouse keeper", "renewable energy", "remote work", "the French Revolution", "a lost dog", "coffee",
    "climate policy", "a trip to Portugal", "stage fright", "a small bakery", "sleep", "the Roman Senate",
    "learning the guitar", "social media", "an old friend", "a job interview", "urban gardening", "jazz",
)  # fmt: skip

_TEMPLATES = (
    "Write a short story about {}.",
    "Compose an engaging blog post about {}, with a strong opening and a vivid ending.",
    "Draft a polite email to my manager about {}.",
    "Write a poem about {} in four stanzas.",
    "Pretend to be an expert on {} and answer my questions in your own voice.",
    "Imagine you are a famous detective who has to deal with {}. How would you begin?",
    "What are some tips for someone who is new to {}?",
    "Can you help me come up with ideas for a party about {}?",
    "How did {} influence society, and why does it still matter?",
    "Explain the significance of {} to a ten year old.",
    "Discuss the advantages and disadvantages of {} with examples.",
    "What do you think about {}? Give me your honest opinion.",
    "Describe {} as if you were a travel writer. Include the senses.",
    "Summarize the most important facts about {} in three bullet points.",
    "Rewrite the following sentence about {} so that it sounds more formal: it was kind of great.",
    "Read the following review about {} and extract the names, dates and prices as JSON.",
    "Suggest five titles for a podcast about {}.",
    "Plan a week of lessons about {} for beginners, with goals for each day.",
    "I have been thinking about {} lately and I feel stuck. What should I do?",
    "Compare two ways of looking at {} and recommend one of them.",
    "What led to {}, and what came of it?",
    "How does {} work? Explain it so that a student understands it.",
    "What is known about {}, and which questions are still open?",
    "What is the difference between {} and what people usually think of it?",
)


_NAMES = (
    ("Mara", "Joel", "Ines", "Theo"), ("Petra", "Sam", "Lucia", "Karl"), ("Nora", "Emil", "Yusuf", "Greta"),
    ("Vera", "Hugo", "Mina", "Otto"), ("Lea", "Anton", "Sara", "Ivo"), ("Dana", "Felix", "Rosa", "Paul"),
)  # fmt: skip
_THINGS = (
    ("swans", "birds", "white"), ("tailors", "jugglers", "patient"), ("poets", "gardeners", "cheerful"),
    ("boats", "machines", "noisy"), ("novels", "gifts", "heavy"), ("robots", "dancers", "polite"),
)  # fmt: skip
_PUZZLES = (
    "{a} is older than {b}, and {b} is older than {c}. Who is the youngest?",
    "{a} is taller than {b} but shorter than {c}. Is {c} taller than {b}? Say how you know.",
    "{a} has three brothers, and each brother has two sisters. How many sisters does {a} have?",
    "{a}'s mother has three children. Two of them are called {b} and {c}. What is the third one called?",
    "{a} is the sister of {b}'s father. What relation is {b} to {a}?",
    "In a row of seats {a} sits to the left of {b}, {c} sits at the right end and {d} next to {c}. Who sits "
    "in the second seat?",
    "{a}, {b}, {c} and {d} finished a race. {b} came in before {d} and right behind {a}; {c} was not last. "
    "In which order did they finish?",
    "{a} walks south for a while, turns left, walks on and turns left again. Which way does {a} face now?",
    "{a} always lies and {b} always tells the truth. One of them says: 'We are both liars.' Who said it?",
    "{a} must bring a fox, a goose and a sack of corn across a river in a boat that holds only one of them "
    "at a time. How can {a} do it?",
    "{a} has eight coins that look the same; one is lighter. How few weighings on a balance find it?",
    "All {x} are {y}. Some {y} are {z}. Does it follow that some {x} are {z}?",
    "No {x} are {z}. Every one of the {y} is {z}. Can any of the {x} be among the {y}? Justify your answer.",
    "If it rains, the {x} stay at home. The {x} did not stay at home. What can be concluded about the rain?",
    "Since the town bought more {x}, fewer people have been ill. Did the {x} make them healthy? Which flaw "
    "does this argument have?",
    "Which word is the odd one out: {x}, {y}, clouds, thirteen? Give your reason.",
    "What comes next: {x}, {y}, {x}, {x}, {y}, {x}, {x}, {x}?",
    "A man lives on the tenth floor and takes the lift down each day, but on the way back gets out at the "
    "sixth and walks, unless {a} is with him. Why?",
    "How could {a} fall from a ladder of twenty steps and not be hurt?",
    "The more {x} you take away, the bigger it becomes. What is it?",
)


_MATHEMATICS = (
    "Prove that the square root of {m} is irrational.",
    "Show that there are infinitely many numbers that are divisible by both {n} and {m}.",
    "Show that the sum of {n} odd numbers in a row is divisible by {n}.",
    "What is the probability of at least one six in {n} throws of a die?",
    "How many ways are there to choose {n} people out of {m}?",
    "Find the smallest number that leaves the remainder {n} when divided by {m}.",
    "What is the area of a circle with radius {m}?",
    "Calculate the derivative of x^{n} + {m}x.",
    "If f(x) = {n}x + {m}, what is f(f({n}))?",
    "Is {m} a prime number? Explain how you know.",
)


def mathematics() -> list[str]:
    """Return short mathematics questions in plain words, every template with several numbers."""
    return [
        template.format(n=n, m=m)
        for template in _MATHEMATICS
        for n, m in ((2, 11), (3, 24), (4, 35), (5, 47), (6, 63), (7, 90))
    ]


def puzzles() -> list[str]:
    """Return prompts that ask for reasoning, every template with several names and things."""
    return [
        template.format(**dict(zip("abcd", names, strict=True)), **dict(zip("xyz", things, strict=True)))
        for template in _PUZZLES
        for names, things in zip(_NAMES, _THINGS, strict=True)
    ]


def open_prompts() -> list[str]:
    """Return open-ended prompts, every template with several topics."""
    return [
        template.format(_TOPICS[(place * 7 + step * 5) % len(_TOPICS)])
        for place, template in enumerate(_TEMPLATES)
        for step in range(12)
    ]


def requests(kind: str) -> list[str]:
    """Return the hand-written requests of a kind: "open", "chore", "talk" or "fact"."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["prompt"] for row in rows if row["kind"] == kind]
