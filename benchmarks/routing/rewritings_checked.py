"""Other rewritings than those that the normalisation was made with, which it was checked with meanwhile.

They were written before it. Its mistakes on some of them were corrected (unlettered choices, "How are you?").
"""

from __future__ import annotations

import random
import re

from benchmarks.routing.rewritings import Rewriting, after, around, before, either, replaced, typos

_NEIGHBOURS = dict(
    zip(
        "qwertyuiopasdfghjklzxcvbnm",
        ("wa", "qes", "wrd", "etf", "ryg", "tuh", "yij", "uok", "ipl", "o", "qsz", "adw", "sfe", "dgr", "fht",
         "gjy", "hku", "jli", "k", "xa", "zcs", "xvd", "cbf", "vng", "bmh", "n"),
        strict=True,
    )
)  # fmt: skip


def _neighbour(word: str, at: int, rng: random.Random) -> str:
    return word[:at] + rng.choice(_NEIGHBOURS[word[at].lower()]) + word[at + 1 :]


def _inserted(word: str, at: int, rng: random.Random) -> str:
    return word[:at] + rng.choice("etaoinsr") + word[at:]


def _without_a_space(prompt: str, rng: random.Random) -> str:
    places = [match.start() for match in re.finditer(r"(?<=[a-z]) (?=[a-z])", prompt)]
    if not places:
        return prompt
    place = rng.choice(places)
    return prompt[:place] + prompt[place + 1 :]


def _title(prompt: str, _: random.Random) -> str:
    return re.sub(r"\b[a-z]", lambda match: match[0].upper(), prompt)


def _random_case(prompt: str, rng: random.Random) -> str:
    return "".join(rng.choice((char.lower(), char.upper())) for char in prompt)


def _fillers(prompt: str, rng: random.Random) -> str:
    """Return *prompt* with one filler word at the beginning of a word in its middle."""
    words = prompt.split(" ")
    if len(words) < 4:
        return prompt
    place = rng.randrange(1, len(words) - 1)
    return " ".join(
        [*words[:place], rng.choice(("just", "really", "actually", "basically", "um,")), *words[place:]]
    )


_AMERICAN = (
    ("colours", "colors"), ("organisation", "organization"), ("travelled", "traveled"), ("honour", "honor"),
    ("organization", "organisation"), ("realize", "realise"), ("minimize", "minimise"),
    ("catalog", "catalogue"),
    ("fiber", "fibre"), ("maximize", "maximise"), ("behaviors", "behaviours"), ("flavor", "flavour"),
    ("favor", "favour"), ("modeling", "modelling"), ("license", "licence"), ("characterize", "characterise"),
    ("centimeters", "centimetres"), ("utilize", "utilise"), ("customize", "customise"), ("check", "cheque"),
)  # fmt: skip
_OPEN = (
    ("isn't", "is not"), ("don't", "do not"), ("doesn't", "does not"), ("didn't", "did not"), ("i'm", "I am"),
    ("can't", "cannot"), ("it's", "it is"), ("what's", "what is"), ("won't", "will not"), ("i've", "I have"),
    ("we are", "we're"), ("has not", "hasn't"), ("were not", "weren't"), ("was not", "wasn't"),
    ("should not", "shouldn't"), ("could not", "couldn't"), ("she is", "she's"), ("i will", "I'll"),
    ("how is", "how's"), ("where is", "where's"), ("have not", "haven't"), ("you will", "you'll"),
)  # fmt: skip

CHECKED: dict[str, Rewriting] = {
    "greeting": before(
        "Greetings! ",
        "Hi there, ",
        "Good evening! ",
        "Hey everyone, ",
        "Howdy! ",
        "Good afternoon, my friend. ",
        "Yo, ",
        "Hello ChatGPT, ",
        "Hi! How are you? ",
    ),
    "polite opening": before(
        "I trust this message finds you well. ",
        "Hope all is good with you. Here is something I have been wondering about. ",
        "I was hoping you might be able to assist me with something. ",
        "It would be wonderful if you could take a look at this for me. ",
        "Excuse me for asking, this may be a silly question. ",
        "I know you are busy, so thank you for taking the time to read this. ",
        "I'm stuck and would be really grateful for some guidance. ",
        "My teacher gave us this one and I am curious what you think. ",
    ),
    "polite request": before(
        "Kindly ",
        "Would you mind answering this for me? ",
        "I'd be grateful if you could answer: ",
        "Could you give me a hand with the next question? ",
        "I was wondering: ",
        "Do me a favor and ",
        "I want you to answer the question below.\n\n",
        "May I ask you something? ",
    ),
    "polite closing": after(
        " Many thanks!",
        " Thanks so much, I really appreciate it!",
        "\nBest regards,\nAlex",
        " Thx",
        " Ta!",
        "\n\nLooking forward to your reply.",
        " I'd be very grateful.",
        " Thank you for your time and patience!",
        " Have a nice day!",
    ),
    "careful closing": after(
        " Think carefully before you answer.",
        " Make sure your answer is right.",
        " Be as accurate as possible.",
        "\nPlease respond with your best answer.",
        "\nFinal answer:",
        " This is important to me.",
        "\n\nResponse:",
        " Double-check your work.",
        " Let me know if anything is unclear.",
    ),
    "labels": around(
        "Task: {}",
        "Query: {}",
        "Prompt: {}",
        "[INST] {} [/INST]",
        "Human: {}\n\nAssistant:",
        "<question>{}</question>",
        "Exercise 3. {}",
        "My question is: {}",
        "Input: {}\nOutput:",
        "1. {}",
    ),
    "quotes": around("«{}»", "‘{}’", "„{}“", "`{}`", '"""\n{}\n"""', "「{}」", "({})"),
    "fence": around(
        "```markdown\n{}\n```", "````\n{}\n````", "```plaintext\n{}\n```\n", "---\n{}\n---", "<pre>{}</pre>"
    ),
    "markdown": around(
        "__{}__", "### Question\n\n{}", "- {}", "_{}_", "***{}***", "# {}", "**Q:** {}", "<p>{}</p>"
    ),
    "title case": _title,
    "random case": _random_case,
    "typos: neighbours": typos(_neighbour, 0.05),
    "typos: inserted": typos(_inserted, 0.05),
    "typos: missing space": _without_a_space,
    "spaces": either(
        lambda prompt, _: prompt.replace(" ", "\u00a0"),
        lambda prompt, _: prompt.replace(". ", ".\n"),
        lambda prompt, _: "    " + prompt.replace("\n", "\n    "),
        lambda prompt, _: prompt.replace(" ", "\t"),
        lambda prompt, _: prompt.replace("\n", "\n\n\n"),
        lambda prompt, _: "\ufeff" + prompt + "\u200b",
    ),
    "line breaks": either(
        lambda prompt, _: re.sub(r"((?:\S+ ){7}\S+) ", r"\1\n", prompt),
        lambda prompt, _: prompt.replace(", ", ",\n"),
        lambda prompt, _: prompt.replace("? ", "?\n\n"),
    ),
    "punctuation": either(
        lambda prompt, _: prompt.rstrip().rstrip("?.:!") + "...",
        lambda prompt, _: prompt.replace(", ", " , "),
        lambda prompt, _: prompt.replace(",", ""),
        lambda prompt, _: prompt.replace("?", " ?").replace("!", " !"),
        lambda prompt, _: prompt.rstrip().rstrip(".?") + "!",
        lambda prompt, _: prompt.replace('"', "'").replace("-", "—"),
    ),
    "emoji": either(after(" ❤️", " 🚀🚀🚀", " ;-)", " :)"), before("✨ ", "❓ ", "🔥Q: ")),
    "contractions": replaced(_OPEN, ignore_case=True),
    "spelling": replaced(_AMERICAN, ignore_case=True),
    "other languages": around(
        "Olá! {} Obrigado!",
        "नमस्ते! {} धन्यवाद।",
        "مرحبا، {} شكرا لك",
        "Ciao, {} Grazie mille!",
        "こんにちは。{} お願いします。",
        "Halo, {} Terima kasih banyak.",
        "السلام علیکم، {} شکریہ",
        "Dzień dobry, {} Dziękuję!",
        "নমস্কার! {} ধন্যবাদ।",
        "Salut, {} S'il te plaît.",
        "Buenas tardes. {} ¡Se lo agradezco mucho!",
    ),
    "choices": either(
        lambda prompt, _: re.sub(r"\n([A-J])[.)] ", r"\n* \1) ", prompt),
        lambda prompt, _: re.sub(r"\n([A-J])[.)] ", r"\n[\1] ", prompt),
        lambda prompt, _: re.sub(r"\n([A-J])[.)] ", r" \1) ", prompt),
        lambda prompt, _: re.sub(r"\n([A-J])[.)] ", r"\n**\1.** ", prompt),
        lambda prompt, _: re.sub(r"\n([A-J])[.)] ", r"\n- ", prompt),
    ),
    "fillers": _fillers,
    "persona": before(
        "You are a helpful assistant. ",
        "You are an AI model that answers questions truthfully.\n\n",
        "Act as an expert. ",
        "You are ChatGPT, a large language model. ",
    ),
    "twice framed": around(
        "Hello! Please read the following carefully.\n\n---\n\n{}\n\n---\n\nThank you!",
        'Hi, I hope you are well.\n\nQuestion: "{}"\n\nThanks in advance,\nSam',
        "Dear all,\nI have the following question:\n```\n{}\n```\nAny help is appreciated.",
    ),
}
