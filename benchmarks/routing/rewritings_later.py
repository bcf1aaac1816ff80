"""Rewritings that were written after the first version of the normalisation, and improved it."""

from __future__ import annotations

import random
import re

from benchmarks.routing.rewritings import Rewriting, after, around, before, either, replaced, typos


def _two_letters(word: str, at: int, rng: random.Random) -> str:
    """Return *word* with two wrong letters: one is replaced, one is repeated."""
    return word[:at] + rng.choice("aeiounst") + word[at] + word[at:][1:]


def _phonetic(word: str, _: int, rng: random.Random) -> str:
    pairs = [
        ("ie", "ei"),
        ("ea", "ee"),
        ("ph", "f"),
        ("tion", "sion"),
        ("ou", "oo"),
        ("ck", "k"),
        ("ll", "l"),
        ("ss", "s"),
    ]
    rng.shuffle(pairs)
    return next((word.replace(old, new, 1) for old, new in pairs if old in word), word[:-2] + word[-1])


def _broken_line(prompt: str, rng: random.Random) -> str:
    places = [match.start() for match in re.finditer(r"(?<=\w) (?=\w)", prompt)]
    for place in sorted(rng.sample(places, min(3, len(places)))):
        prompt = prompt[:place] + "\n" + prompt[place + 1 :]
    return prompt


def _no_apostrophes(prompt: str, _: random.Random) -> str:
    return re.sub(r"(?<=[a-z])['’](?=(?:t|s|re|ve|ll|m)\b)", "", prompt)


def _shouted_words(prompt: str, rng: random.Random) -> str:
    return " ".join(word.upper() if rng.random() < 0.2 else word for word in prompt.split(" "))


LATER: dict[str, Rewriting] = {
    "greeting": before(
        "Hey there! ",
        "Hi friend, ",
        "Good day to you. ",
        "Hiya! ",
        "Hello AI, ",
        "Hi Claude! ",
        "Hey buddy, ",
        "Hello again! ",
        "Happy Monday! ",
        "Hi, it's me again. ",
    ),
    "polite opening": before(
        "I hope you had a good weekend. ",
        "I'd like your opinion on something. ",
        "Thanks for being here to help me out. ",
        "I have been struggling with this for a while. ",
        "Would you be so kind as to answer this? ",
        "If you don't mind, I would like to ask you something. ",
        "I really need some help here. ",
        "This has been bothering me all day. ",
        "First of all, thank you for all your help so far. ",
        "I am preparing for my exam tomorrow. ",
    ),
    "polite request": before(
        "Can you please explain the following to me: ",
        "Help me with this one: ",
        "Tell me, ",
        "Please tell me: ",
        "Could someone tell me: ",
        "I want to know the answer to this: ",
        "Be so kind and answer: ",
        "Here's my question: ",
        "I need your help with the following:\n\n",
        "Answer me this: ",
    ),
    "polite closing": after(
        " Thank you kindly.",
        " Much appreciated!",
        " Thanks a million!",
        "\nSincerely,\nDr. J. Smith",
        " Thanks in advance :)",
        " That would help me a lot.",
        "\n\nWith kind regards,\nMaria",
        " I'd appreciate any help.",
        " Cheers, mate!",
        " Hope you can help.",
    ),
    "careful closing": after(
        " Please be precise.",
        " Answer as well as you can.",
        " Do your best!",
        "\nGive your answer below.",
        "\nCorrect answer:",
        " Please don't make mistakes.",
        " I trust your judgment.",
        "\nYour response:",
        " Think twice before you reply.",
        " No need to hurry.",
    ),
    "labels": around(
        "QUESTION: {}",
        "Q1. {}",
        "Question 5: {}\nAnswer:",
        "Item: {}",
        "Request: {}",
        "Me: {}\nYou:",
        "### Question\n{}\n### Answer",
        "<|user|>\n{}\n<|assistant|>",
        "Text: {}",
        "Here is the question:\n{}",
    ),
    "quotes": around("“ {} ”", "‹{}›", "''{}''", "> {}\n", "[{}]", "{{}}", '" {} "'),
    "fence": around(
        "```txt\n{}\n```",
        "``` {} ```",
        "***\n{}\n***",
        "======\n{}\n======",
        "<<<\n{}\n>>>",
        "<prompt>\n{}\n</prompt>",
    ),
    "markdown": around(
        "* {}", "## Question: {}", "> **{}**", "1) {}", "**Task**\n\n{}", "<b>{}</b>", "~~~md\n{}\n~~~"
    ),
    "shouted words": _shouted_words,
    "first letter": lambda prompt, _: prompt[:1].swapcase() + prompt[1:],
    "typos: two letters": typos(_two_letters, 0.05),
    "typos: phonetic": typos(_phonetic, 0.08),
    "apostrophes": _no_apostrophes,
    "spaces": either(
        lambda prompt, _: prompt.replace(" ", "\u2009"),
        lambda prompt, _: re.sub(r"([.?!,]) ", r"\1   ", prompt),
        lambda prompt, _: "\t" + prompt + "\t\n",
        lambda prompt, _: prompt.replace("\n", "\n \n"),
    ),
    "line breaks": either(_broken_line, lambda prompt, _: prompt.replace(". ", ".\n\n")),
    "punctuation": either(
        lambda prompt, _: prompt.rstrip() + "?" if not prompt.rstrip().endswith("?") else prompt,
        lambda prompt, _: prompt.replace("?", "?!"),
        lambda prompt, _: prompt.replace(". ", "; "),
        lambda prompt, _: prompt.replace("'", "`"),
        lambda prompt, _: prompt.replace("?", "？").replace(",", "，").replace(".", "．"),
    ),
    "emoji": either(after(" 😅", " 🤷‍♀️", " ^^", " xD", " :-)"), before("📚 ", "🙋 ", "💡💡 ")),
    "abbreviations": replaced(
        (
            ("you", "u"),
            ("are", "r"),
            ("please", "pls"),
            ("and", "&"),
            ("because", "bc"),
            ("with", "w/"),
            ("people", "ppl"),
        )
    ),
    "other languages": around(
        "Hej! {} Tack!",
        "Γεια σας! {} Ευχαριστώ!",
        "안녕하세요! {} 감사합니다.",
        "Merhaba, {} Teşekkürler!",
        "שלום, {} תודה!",
        "Coucou, {} Bonne journée !",
        "¡Buenos días! {} Un saludo.",
        "Liebe Leute, {} Mit freundlichen Grüßen",
        "Xin chào, {} Cảm ơn!",
        "请问，{} 多谢！",
        "Добрый день! {} Заранее благодарен.",
    ),
    "choices": either(
        lambda prompt, _: re.sub(r"\n([A-J])[.)] ", lambda match: f"\n{match[1].lower()}. ", prompt),
        lambda prompt, _: re.sub(r"\n([A-J])[.)] ", lambda match: f"\n{ord(match[1]) - 64}. ", prompt),
        lambda prompt, _: re.sub(r"\n([A-J])[.)] ", r"\nOption \1: ", prompt),
        lambda prompt, _: re.sub(r"\n([A-J])[.)] ", r"\n\1 - ", prompt),
    ),
    "hedges": before(
        "So, ", "Well, ", "Okay, ", "Alright, ", "Hmm, ", "By the way, ", "Quick one: ", "Just curious: "
    ),
    "persona": before(
        "You are a knowledgeable and friendly assistant. ",
        "As an AI assistant, answer the user.\n\n",
        "You're a world-class expert. ",
        "System: You are helpful and harmless.\n\nUser: ",
    ),
}
