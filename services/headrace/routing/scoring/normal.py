"""Reduce a prompt to what it asks for, in one form for many ways to write it.

A greeting, a polite sentence, "Question:", quotes or a code fence around a prompt, its case, its white space
and its typographic characters do not change what it asks for, so `prompt_features.py` reads the text without
them. A prompt that consists of framing alone stays as it is. The words of framing are in `framing.py`.
"""

from __future__ import annotations

import re

from headrace.routing.scoring import lexicon
from headrace.routing.scoring.framing import is_framing, is_known
from headrace.routing.scoring.words import fold, words_of

_HEAD, _TAIL = 3_000, 1_000  # characters that are read of a long prompt
_ROUNDS = 8  # frames around frames that are removed
_ASIDES = 2  # remarks before a question that are removed
_ASIDE_WORDS = 14
_USUAL = 0.7  # share of the words of a remark that framing has too
_REST = 12  # characters that are left
_FRAME = 240  # characters of the longest sentence that can be framing

_CHARACTERS = str.maketrans(
    dict.fromkeys("“”„‟«»「」『』〝〞＂", '"')
    | dict.fromkeys("‘’‚‛′´ʼ＇", "'")
    | dict.fromkeys("‐‑‒–—―−", "-")
    | dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad\ufe0e\ufe0f¿¡", "")
    | {"•": "-", "●": "-", "▪": "-", "◦": "-", "？": "? ", "！": "! ", "，": ", ", "：": ": ", "؟": "?"}
    | {"；": "; ", "（": "(", "）": ")", "。": ". ", "．": ".", "、": ", ", "،": ",", "।": ".", "۔": "."}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
_EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\u2300-\u23ff]+")

_CONTENT_SIGN = re.compile(r"[\d()]")
_BACKTICK = re.compile(r"(?<=[a-z])`(?=[a-z]{1,2}\b)")
_CONTRACTION = re.compile(r"(?<=[a-z])(?:n't|'(?:s|re|ve|ll|m|d))\b|\bcannot\b")
_LONG_FORM = {
    "n't": " not", "'s": " is", "'re": " are", "'ve": " have", "'ll": " will", "'m": " am", "'d": " would",
    "cannot": "can not",
}  # fmt: skip

# Abbreviations of chats; single letters between words, and only where no formula makes them variables.
_SHORT = re.compile(
    r"(?:(?<=[a-z]{2} )|\A)(?:(?:u|r|ur|y)(?= [a-z]{2})|(?:u|r)(?=[?.!,])|(?:bc|cuz|ppl|abt|w/o|w/|&)(?= ))"
)
_WHOLE = {
    "u": "you", "r": "are", "ur": "your", "y": "why", "bc": "because", "cuz": "because", "ppl": "people",
    "abt": "about", "w/o": "without", "w/": "with", "&": "and",
}  # fmt: skip
# What a text with such a word contains, unless it begins with it.
_SHORT_MARKS = tuple(
    f" {word}{end}"
    for word, ends in {
        "u": " ?.!,", "r": " ?.!,", "ur": " ", "y": " ", "bc": " ", "cuz": " ", "ppl": " ", "abt": " ",
        "w/o": " ", "w/": " ", "&": " ",
    }.items()
    for end in ends
)  # fmt: skip
_REPEATED_MARKS = ("??", "!!", "?!", "!?", " ,", " ?", " !", " ;")
_FORMULA = re.compile(r"[=^\\$<>{}]")

# Lines that begin like this are structure: items, choices, rows, code.
_ITEM = re.compile(r"[-*+>|#{\[<]|\(?(?:[a-j]|\d+|[ivx]+)[.):] ")
_CHOICE = re.compile(r"^(?:[-*+] )?(?:[a-z]{3,8} )?[(\[]?([a-j])(?:[.):\]]{1,3}| [-:]) ", re.MULTILINE)
_UNLETTERED = re.compile(r"(?<=[^.:;!,])(?:\n(?:[-*+]|\d[.)]) [^\n]+){2,10}\Z")
_BULLET = re.compile(r"\n(?:[-*+]|\d[.)]) ")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_REPEATED = re.compile(r"([?!])[?!]+| (?=[,?!;]\s)")
_UNFINISHED = re.compile(r"[\w,'\"-]\Z")

_LABEL = re.compile(
    r"(?:how (?:are|is) (?:you|it|everything|things)\b[^.?!\n]{0,30}[.?!]|\[inst\]|(?:q|question|problem|"
    r"task|exercise|user|human|title|system|me|item|text|request)(?: ?#?\d{1,3})?[:.)]|1[.)] |#+ |[-*>] )\s*"
)
_CLOSING = re.compile(
    r"\s*(?:\b(?:a|solution|output)\s*:|you\s*:|\[/inst\]|[`~*=<>#-]{3,}|<\|\w{1,20}\|>|[:;=x^]-?[()dp^])\s*\Z"
)
_CLOSES = ":])(pd-`~*=<>#^"  # the last characters of `_CLOSING`
_PREAMBLE = re.compile(
    r"(?:the following (?:is|are) (?:a )?(?:multiple[- ]choice )?questions?\b|answer the following\b|"
    r"answer (?:the|this|with)\b|solve the following\b|you are an? (?:helpful|expert)\b|"
    r"below is an instruction\b)[^\n:]{0,200}[\n:]+\s*|(?:you are|act as|as) an? [^.!?\n]{0,60}"
    r"\b(?:assistant|expert|ai|chatbot|tutor|language model)[.!\n]+\s*"
)
_SIGNATURE = re.compile(
    r"(?:best|kind|warm|many)? ?(?:regards|wishes|sincerely|yours|cheers|thanks(?: in advance| a lot)?|"
    r"best),?\s[\w.]{1,20}(?: [\w.]{1,20})?\s*\Z"
)
_LEAD_IN = re.compile(
    r"(?:(?:can|could|would|will) (?:you|u)(?: (?:please|kindly|possibly|maybe))*(?: (?:tell|help) me"
    r"(?: to| with)?)?|(?:please|kindly|pls|plz),?(?: (?:tell|help) me(?: to| with)?)?|"
    r"i (?:would|want|need) (?:like )?(?:you )?to(?: (?:know|ask))?|do me a favou?r and|"
    r"i was wondering(?: if| whether)?(?: you could)?|(?:so|ok|okay|well|um|now),)[,:]?\s+"
)
# Words that begin a closing, where nothing but its words separates it from the question.
_CLOSING_BEGINS = re.compile(
    r"\b(?:make sure|be (?:as|sure|careful|precise)|let me know|take your time|double check|looking forward|"
    r"hope|think (?:carefully|twice)|"
    r"answer (?:as|with care|carefully)|have a (?:nice|good|great)|do your best|"
    r"i (?:would|will|really|am|appreciate|need|hope)|give (?:me|your)|(?:many |muchas |vielen |schonen )?"
    r"(?:thanks?|thx|ty|ta|cheers|please|pls|kindly|merci|gracias|danke|dank|bitte|obrigad[oa]|grazie|terima|"
    r"tolong|mohon|por favor|s'il)|заранее|спасибо|пожалуйста|شكر|धन्यवाद|कृपया|ধন্যবাদ|অনুগ্রহ)\b|"
    r"谢谢|感谢|ありがとう|お願い"
)
_PAIRS = {'"': '"', "'": "'", "(": ")", "`": "`", "[": "]", "{": "}", "‹": "›"}
_TAG = re.compile(r"<(\w{1,20})>\s*(.*?)\s*</\1>\Z", re.DOTALL)
_FENCE = re.compile(r"(\"{3}|'{2,3})\s*(.*?)\s*\1\Z", re.DOTALL)
_RULES = "`~*=<>#-|"
_RULE = re.compile(r"(?:[`~*=<>#-]{3,}(?:[ \w+-]{0,20}\n)?|<\|\w{1,20}\|>)\s*")
_RULE_END = re.compile(r"<\|\w{1,20}\|>\Z")
_BOLD = re.compile(
    r"(?<![\w*])(?:(\*{1,3})(?=[^\s*])([^*\n]{1,200})(?<=\S)\1|(_{1,3})(?=[^\s_])([^_\n]{1,200})(?<=\S)\3)(?![\w*])"
)
_EMPHASIS = re.compile(r"(\*{1,3}|_{1,3})(?=[^\s*_])(.*[^\s*_])\1\Z", re.DOTALL)
_SENTENCE = re.compile(r"[^.?!:\n]*(?:[.?!:]+(?=\s|\Z)|\n)\s*")
_END = re.compile(r"(?:[.?!:]+[\"'$)\]]*(?=\s|\Z)|\n)\s*")
_CLAUSE = re.compile(r"[^.?!:,\n]*,\s*(?:(?:but|so|and|then) )?")


def clip(text: str) -> str:
    """Return the beginning and the end of a very long text, and other texts unchanged."""
    if len(text) <= _HEAD + _TAIL:
        return text
    return text[:_HEAD] + "\n" + text[-_TAIL:]


def question(text: str) -> str:
    """Return what *text* asks for: in lower case, without framing, without line breaks within sentences."""
    whole = found = _lines(_characters(text))
    for _ in range(_ROUNDS):
        shorter = _without_closing(_without_opening(_unwrapped(found)))
        if not shorter or shorter == found:
            break
        found = shorter
    found = _without_asides(found)
    return _joined(_choices(found if any(map(str.isalnum, found)) else whole))


def _characters(text: str) -> str:
    """Return *text* in lower case, with ASCII for typographic characters and without emoji."""
    if not text.isascii():
        text = _EMOJI.sub(" ", text.translate(_CHARACTERS))
    text = fold(text)
    if "`" in text:
        text = _BACKTICK.sub("'", text)
    if "'" in text or "cannot" in text:
        text = text.replace("can't", "can not").replace("won't", "will not")
        text = _CONTRACTION.sub(lambda match: _LONG_FORM[match[0]], text)
    if any(map(f" {text}".__contains__, _SHORT_MARKS)) and not _FORMULA.search(text):
        text = _SHORT.sub(lambda match: _WHOLE[match[0]], text)
    if "*" in text or "_" in text:
        text = _BOLD.sub(r"\2\4", text)
    if "," in text:
        text = _THOUSANDS.sub("", text)
    return _REPEATED.sub(r"\1", text) if any(map(text.__contains__, _REPEATED_MARKS)) else text


def _lines(text: str) -> str:
    """Return *text* without blank lines and repeated spaces."""
    return "\n".join(filter(None, [" ".join(line.split()) for line in text.splitlines()]))


def _joined(text: str) -> str:
    """Return *text* with lines joined where a sentence goes on."""
    if "\n" not in text:
        return text
    lines = text.split("\n")
    parts = lines[:1]
    for line in lines[1:]:
        goes_on = _UNFINISHED.search(parts[-1]) and not _ITEM.match(line)
        parts.append((" " if goes_on else "\n") + line)
    return "".join(parts)


def _choices(text: str) -> str:
    """Return *text* with the choices of a question marked as `a) `, where each has a line of its own."""
    if "\n" not in text:
        return text
    if len(_CHOICE.findall(text)) < 2 and (match := _UNLETTERED.search(text)):
        items = _BULLET.split(match[0])[1:]
        return text[: match.start()] + "".join(
            f"\n{letter}) {item}" for letter, item in zip("abcdefghij", items, strict=False)
        )
    return _CHOICE.sub(r"\1) ", text)


def _unwrapped(text: str) -> str:
    """Return *text* without quotes, a fence or a tag around the whole of it."""
    first = text[:1]
    if first in _RULES and (match := _RULE.match(text)):
        return _without_rule(text[match.end() :])
    if first in '"<' and (match := _FENCE.match(text) or _TAG.match(text)):
        return match[2]
    if first in "*_" and (match := _EMPHASIS.match(text)):
        return match[2]
    if first in _PAIRS and text[-1:] == _PAIRS[first] and _PAIRS[first] not in text[1:-1]:
        return text[1:-1].strip()
    return text


def _without_rule(text: str) -> str:
    """Return *text* without a rule at its end. A regular expression would take quadratic time."""
    before = text.rstrip("`~*=<>#-")
    if len(text) - len(before) >= 3:
        return before.rstrip()
    match = _RULE_END.search(text, max(len(text) - 24, 0))
    return text[: match.start()].rstrip() if match else text


def _without_opening(text: str) -> str:
    """Return *text* without the first piece of framing before its question, if there is one."""
    if match := _LABEL.match(text):
        return text[match.end() :]
    begin = end = 0
    while match := _SENTENCE.match(text, end, _FRAME):
        words = words_of(match[0])
        if not is_framing(words, keyed=False):
            break
        end = match.end()
        begin = end if is_framing(words) else begin
    if begin:
        return text[begin:]
    if (match := _CLAUSE.match(text, 0, _FRAME)) and is_framing(words_of(match[0])):
        return text[match.end() :]
    if match := _PREAMBLE.match(text) or _LEAD_IN.match(text):
        return text[match.end() :]
    return text


def _without_asides(text: str) -> str:
    """Return *text* without at most two remarks about the writer or to the reader at its beginning."""
    end = 0
    for _ in range(_ASIDES):
        match = _SENTENCE.match(text, end, end + _FRAME)
        if not match or len(text) - match.end() < _REST or not _is_aside(match[0]):
            break
        end = match.end()
    return text[end:]


def _is_aside(sentence: str) -> bool:
    """Return whether *sentence* is about the writer or the reader, or a call like "Hej!", without content."""
    words = words_of(sentence)
    about = lexicon.about_persons(words) or (len(words) <= 4 and "!" in sentence)
    return about and _is_remark(sentence)


def _is_remark(sentence: str) -> bool:
    """Return whether *sentence* is a short statement without numbers that points to no kind of prompt."""
    words = words_of(sentence)
    short = 0 < len(words) <= _ASIDE_WORDS and "?" not in sentence and not _CONTENT_SIGN.search(sentence)
    usual = len(words) <= 4 or sum(map(is_known, words)) >= _USUAL * len(words)
    return short and usual and lexicon.says_nothing(words)


def _without_closing(text: str) -> str:
    """Return *text* without the last piece of framing behind its question, if there is one."""
    start = max(len(text) - _FRAME, 0)
    tail = text[start:]
    if tail[-1:] in _CLOSES and (match := _CLOSING.search(tail, max(len(tail) - 20, 0))):
        return text[: start + match.start()]
    ends = [match.end() for match in _END.finditer(tail) if match.end() < len(tail)]
    if ends and (
        is_framing(words_of(tail[ends[-1] :]))
        or (tail[: ends[-1]].rstrip().endswith("?") and _is_remark(tail[ends[-1] :]))
    ):
        return text[: start + ends[-1]].rstrip()
    if ends and (
        match := _SIGNATURE.match(tail, ends[-1])
        or (_SIGNATURE.match(tail, ends[-2]) if len(ends) > 1 else None)
    ):
        return text[: start + match.start()].rstrip()
    for match in _CLOSING_BEGINS.finditer(tail):
        if is_framing(words_of(tail[match.start() :])):
            return text[: start + match.start()].rstrip()
    return text
