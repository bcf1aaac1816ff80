"""Rewritings that were written last. The normalisation was not made with them.

One correction followed their first measurement: choices with a word before the letter ("Answer A: ").
"""

from __future__ import annotations

import random
import re

from benchmarks.routing.rewritings import Rewriting, after, around, before, either, typos


def _last_letter(word: str, _: int, rng: random.Random) -> str:
    return word[:-1] if rng.random() < 0.5 else word + word[-1]


def _joined_words(prompt: str, rng: random.Random) -> str:
    """Return *prompt* with a space at a wrong place: "th ecat" for "the cat"."""
    places = [match.start() for match in re.finditer(r"(?<=[a-z]{3}) (?=[a-z]{3})", prompt)]
    for place in rng.sample(places, min(2, len(places))):
        prompt = prompt[: place - 1] + " " + prompt[place - 1] + prompt[place + 1 :]
    return prompt


def _starred_word(prompt: str, rng: random.Random) -> str:
    words = [match.span() for match in re.finditer(r"(?<=\s)[A-Za-z]{4,}(?=\s)", prompt)]
    if not words:
        return prompt
    begin, end = rng.choice(words)
    return f"{prompt[:begin]}**{prompt[begin:end]}**{prompt[end:]}"


UNSEEN: dict[str, Rewriting] = {
    "greeting": before(
        "Aloha! ", "Hello world! ", "Hi all, ", "Good evening, sir. ", "Heya, ", "Hi, nice to meet you! "
    ),
    "opening": before(
        "I hope everything is going well on your end. ",
        "Quick question for you. ",
        "I could use some help with this. ",
        "Sorry if this has been asked before. ",
        "You seem to know a lot, so maybe you can help. ",
        "I came across this and could not figure it out. ",
        "Let's try something. ",
        "It would mean a lot if you answered this. ",
    ),
    "request": before(
        "Would you please answer the following? ",
        "Can you figure this out? ",
        "I'd love to hear your answer to this: ",
        "Please have a look at this: ",
        "May I ask: ",
        "Please respond to the following: ",
        "Let me ask you this: ",
    ),
    "closing": after(
        " Thanks for your time.",
        " Have a great day!",
        "\n\nThank you so much in advance for any help!",
        " Greatly appreciated.",
        "\nYours sincerely,\nTom Baker",
        " Any help would be great.",
        " Thanks again!",
        " God bless.",
    ),
    "careful": after(
        " Please take care to answer correctly.",
        " Be honest.",
        " Please reply as soon as possible.",
        "\n\nAnswer: ",
        " Check your answer.",
        " Please think about it first.",
        " Please keep it accurate.",
        "\nThe answer is:",
    ),
    "labels": around(
        "Question - {}",
        "PROBLEM\n{}",
        "Q) {}",
        "Question: {}\n\nPlease answer.",
        "USER: {}\nASSISTANT:",
        "Message: {}",
    ),
    "frames": around(
        "~~~~\n{}\n~~~~",
        '"""{}"""',
        "*** {} ***",
        "<user_query>{}</user_query>",
        "\n\n\n{}\n\n\n",
        "--\n{}\n--",
    ),
    "emphasis": _starred_word,
    "heading": around("# Task\n{}", "**Problem**\n{}", "### {}", "__Question__: {}", "- [ ] {}"),
    "swapped case": lambda prompt, _: prompt.swapcase(),
    "typos: last letter": typos(_last_letter, 0.05),
    "typos: spaces": _joined_words,
    "white space": either(
        lambda prompt, _: prompt.replace(" ", " \u200b"),
        lambda prompt, _: prompt + " " * 40,
        lambda prompt, _: prompt.replace("\n", "\r\n\r\n"),
        lambda prompt, _: re.sub(r"(\S+ \S+ \S+) ", r"\1   ", prompt),
    ),
    "line breaks": lambda prompt, _: re.sub(r"(.{30,45}?) (?=\S)", r"\1\n", prompt),
    "marks": either(
        lambda prompt, _: prompt.rstrip() + "..",
        lambda prompt, _: prompt.replace("?", " ? "),
        lambda prompt, _: prompt.rstrip().rstrip("?."),
        lambda prompt, _: prompt.replace(" - ", " — ").replace("'", "ʼ"),
    ),
    "emoji": either(after(" 🙂", " 💯", " ✅"), before("🚨 ", "➡️ ", "Hi 👋 ")),
    "languages": around(
        "Estimado asistente: {} Saludos cordiales.",
        "Bonsoir, {} Merci bien !",
        "Servus! {} Danke schön!",
        "Oi, tudo bem? {} Valeu!",
        "您好！{} 非常感谢您的帮助。",
        "नमस्कार, {} आपका बहुत धन्यवाद",
        "أهلا، {} وشكرا",
        "Permisi, {} Makasih ya!",
        "すみません、{} よろしく。",
    ),
    "choices": either(
        lambda prompt, _: re.sub(r"\n([A-J])[.)] ", r"\n\1)  ", prompt),
        lambda prompt, _: re.sub(r"\n([A-J])[.)] ", r"\n(\1): ", prompt),
        lambda prompt, _: re.sub(r"\n([A-J])[.)] ", r"\n+ \1. ", prompt),
        lambda prompt, _: re.sub(r"\n([A-J])[.)] ", r"\nAnswer \1: ", prompt),
    ),
}
