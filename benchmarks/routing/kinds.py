"""What is known of kinds of prompts before any row is seen: their typical gain, and prompts of the open kind.

Set by hand, from what is published, where no labelled rows that may be shipped exist:

- The gain of GPT-4 over Mixtral-8x7B: MMLU about 0.13, GSM8K about 0.22 (RouteLLM, arXiv 2406.18665);
  open instructions more, for there the larger model is preferred in most comparisons and not only where
  the smaller one errs (AlpacaEval's public leaderboard); competition mathematics more still.
- In open-ended chat large models lead small ones most in mathematics, coding, reasoning and extraction, and
  hardly in writing, roleplay and the humanities (MT-Bench by category: Zheng et al., arXiv 2306.05685,
  section 4.3).

The prompts of the open kind below are ours, made from templates: they teach the gate what such requests
look like.
"""

from __future__ import annotations

KINDS = ("choices", "word_problem", "mathematics", "code", "fact", "passage", "open")

# The typical gain of each kind.
TYPICAL = {
    "choices": 0.13,
    "word_problem": 0.23,
    "mathematics": 0.29,
    "code": 0.22,
    "fact": 0.07,
    "passage": 0.14,
    "open": 0.20,
}

# Gain per feature at full strength within open-ended chat, and within code where it speaks.
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
    "conditions": 0.03,
    "extraction": 0.06,
    "constraints": 0.01,
    "length": 0.09,
    "questions": 0.02,
    "list_items": 0.02,
    "fractions": 0.03,
    "creative": -0.07,
    "roleplay": -0.04,
    "persona": -0.04,
    "advice": -0.05,
    "first_person": -0.02,
    "transformation": -0.02,
    "humanities": -0.04,
    "fact": -0.02,
    "analysis": -0.01,
    "you": -0.01,
}

# What speaks for a larger tier in a plain question too.
ASKS_MORE = {"length": 0.08, "reasoning": 0.08, "comparison": 0.08, "conditions": 0.03, "programming": 0.1}

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
)
_SMALL_TALK = (
    "Hello!", "Hi, how are you today?", "Thanks a lot, that helped.", "Good morning", "What can you do?",
    "Tell me a joke.", "Who are you?", "Nice to meet you!", "ok thanks", "Happy birthday!", "What's up?",
)  # fmt: skip


def open_prompts() -> list[str]:
    """Prompts of the open kind, every template with several topics."""
    made = [
        template.format(_TOPICS[(place * 7 + step * 5) % len(_TOPICS)])
        for place, template in enumerate(_TEMPLATES)
        for step in range(12)
    ]
    return made + list(_SMALL_TALK) * 2
