"""Rewrite prompts without changing what they ask for; `perturb.py` counts the decisions that change.

`SEEN` has the rewritings that the normalisation was made with, `rewritings_checked.py` and
`rewritings_later.py` those that improved it, and `rewritings_unseen.py` those that were written last.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

Rewriting = Callable[[str, random.Random], str]


def before(*openings: str) -> Rewriting:
    """Return a rewriting that puts one of *openings* in front of a prompt."""
    return lambda prompt, rng: rng.choice(openings) + prompt


def after(*closings: str) -> Rewriting:
    """Return a rewriting that puts one of *closings* behind a prompt."""
    return lambda prompt, rng: prompt.rstrip() + rng.choice(closings)


def around(*frames: str) -> Rewriting:
    """Return a rewriting that puts a prompt in place of `{}` in one of *frames*."""
    return lambda prompt, rng: rng.choice(frames).replace("{}", prompt.strip())


def either(*rewritings: Rewriting) -> Rewriting:
    """Return a rewriting that applies one of *rewritings*."""
    return lambda prompt, rng: rng.choice(rewritings)(prompt, rng)


def replaced(pairs: Sequence[tuple[str, str]], *, ignore_case: bool = False) -> Rewriting:
    """Return a rewriting that replaces whole words, or phrases; a capital letter at the beginning is kept."""
    table = dict(pairs)
    regex = re.compile(
        rf"\b(?:{'|'.join(map(re.escape, table))})\b", re.IGNORECASE if ignore_case else re.NOFLAG
    )

    def found(match: re.Match[str]) -> str:
        new = table[match[0].lower()]
        return new[0].upper() + new[1:] if match[0][0].isupper() else new

    return lambda prompt, _: regex.sub(found, prompt)


def typos(change: Callable[[str, int, random.Random], str], rate: float) -> Rewriting:
    """Return a rewriting that changes a share *rate* of the words of four or more letters, at least one.

    change   returns a word with a typing mistake at a place that is neither its first nor its last letter
    """

    def rewrite(prompt: str, rng: random.Random) -> str:
        places = [match.span() for match in re.finditer(r"[A-Za-z]{4,}", prompt)]
        if not places:
            return prompt
        for begin, end in sorted(rng.sample(places, max(1, int(rate * len(places)))), reverse=True):
            word = prompt[begin:end]
            prompt = prompt[:begin] + change(word, rng.randrange(1, len(word) - 1), rng) + prompt[end:]
        return prompt

    return rewrite


def _swapped(word: str, at: int, _: random.Random) -> str:
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _dropped(word: str, at: int, _: random.Random) -> str:
    return word[:at] + word[at + 1 :]


def _doubled(word: str, at: int, _: random.Random) -> str:
    return word[:at] + word[at] + word[at:]


def _wrapped(width: int) -> Rewriting:
    def rewrite(prompt: str, _: random.Random) -> str:
        lines = []
        for line in prompt.split("\n"):
            while len(line) > width and (cut := line.rfind(" ", 0, width)) > 0:
                lines.append(line[:cut])
                line = line[cut + 1 :]
            lines.append(line)
        return "\n".join(lines)

    return rewrite


def _options(mark: str) -> Rewriting:
    """Return a rewriting of choices on lines of their own; *mark* has `{}` for the letter."""

    def rewrite(prompt: str, _: random.Random) -> str:
        return re.sub(r"\n([A-J])[.)] ", lambda match: "\n" + mark.replace("{}", match[1]), prompt)

    return rewrite


CONTRACTIONS = (
    ("is not", "isn't"), ("are not", "aren't"), ("do not", "don't"), ("does not", "doesn't"),
    ("i am", "I'm"),
    ("did not", "didn't"), ("cannot", "can't"), ("will not", "won't"), ("it is", "it's"),
    ("you are", "you're"),
    ("what is", "what's"), ("who is", "who's"), ("they are", "they're"), ("i have", "I've"),
    ("that is", "that's"), ("there is", "there's"), ("would not", "wouldn't"), ("he is", "he's"),
)  # fmt: skip
_BRITISH = (
    ("color", "colour"), ("center", "centre"), ("behavior", "behaviour"), ("analyze", "analyse"),
    ("summarize", "summarise"), ("organize", "organise"), ("optimize", "optimise"), ("meters", "metres"),
    ("meter", "metre"), ("favorite", "favourite"), ("liters", "litres"), ("math", "maths"), ("gray", "grey"),
    ("traveling", "travelling"), ("labor", "labour"), ("program", "programme"), ("neighbor", "neighbour"),
    ("recognize", "recognise"), ("theater", "theatre"), ("defense", "defence"), ("kilometers", "kilometres"),
)  # fmt: skip

SEEN: dict[str, Rewriting] = {
    "greeting": before("Hi! ", "Hello, ", "Hello there! ", "Good morning. ", "Hey, ", "Dear assistant,\n"),
    "polite opening": before(
        "I hope you are doing well. I have a question for you. ",
        "I hope you're having a great day! ",
        "I would appreciate your help with this. ",
        "Thank you for your help. I need an answer to the following question. ",
        "Sorry to bother you, but I have a quick question. ",
        "I'm not sure about this one. Can you help me? ",
    ),
    "polite request": before(
        "Please ",
        "Could you please help me with this: ",
        "Please answer this: ",
        "I would like to know: ",
        "Can you tell me: ",
        "Please help me with the following question: ",
    ),
    "polite closing": after(
        " Thanks!",
        " Thank you.",
        "\nThanks in advance!",
        " Thank you very much for your help.",
        " Please.",
        "\n\nI appreciate your help.",
        "\nCheers",
    ),
    "careful closing": after(
        " Please answer carefully.",
        " Take your time.",
        "\nLet's think step by step.",
        " Please give me the correct answer.",
        "\nAnswer:",
        "\nYour answer:",
    ),
    "labels": around(
        "Question: {}\nAnswer:",
        "Q: {}\nA:",
        "Problem: {}",
        "### Instruction:\n{}\n\n### Response:",
        "User: {}",
        "Question:\n{}\n\nAnswer:",
    ),
    "quotes": around('"{}"', "“{}”", "'{}'", "> {}"),
    "fence": around("```\n{}\n```", "```text\n{}\n```", "~~~\n{}\n~~~"),
    "markdown": around("**{}**", "# Question\n{}", "**Question:** {}", "## Task\n\n{}", "*{}*"),
    "lower case": lambda prompt, _: prompt.lower(),
    "upper case": lambda prompt, _: prompt.upper(),
    "typos: swapped": typos(_swapped, 0.05),
    "typos: dropped": typos(_dropped, 0.05),
    "typos: doubled": typos(_doubled, 0.05),
    "spaces": either(
        lambda prompt, _: prompt.replace(" ", "  "),
        lambda prompt, _: "\n\n" + prompt + "\n\n",
        lambda prompt, _: prompt.replace("\n", "\n\n"),
        lambda prompt, _: prompt.replace("\n", " \r\n"),
    ),
    "line breaks": either(_wrapped(60), _wrapped(80)),
    "punctuation": either(
        lambda prompt, _: prompt.rstrip().rstrip("?.:!"),
        lambda prompt, _: prompt.replace("?", "??"),
        lambda prompt, _: prompt.rstrip().rstrip(".") + ".",
        lambda prompt, _: prompt.replace("'", "’").replace(' "', " “").replace('"', "”").replace("-", "–"),
    ),
    "emoji": either(after(" 🙏", " 😊👍"), before("🤔 ", "👋 ")),
    "contractions": replaced(CONTRACTIONS, ignore_case=True),
    "spelling": replaced(_BRITISH, ignore_case=True),
    "other languages": around(
        "Bonjour ! {} Merci d'avance.",
        "Hola, {} Muchas gracias.",
        "Guten Tag! {} Vielen Dank!",
        "你好，{} 谢谢！",
        "Здравствуйте! {} Спасибо.",
    ),
    "choices": either(_options("({}) "), _options("{}: "), _options("- {}. "), _options("{}) ")),
}
