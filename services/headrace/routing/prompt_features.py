"""Measure the features of a prompt, each from 0 to 1.

The features describe the kind of text and how much it asks for. `scorer.py` turns them into an expected gain.
Measuring is deterministic and takes a fraction of a millisecond for any length: of a very long prompt only
the beginning and the end are read. Words are looked up in a lexicon (`_LEXICON`), which is ten times as fast
as one regular expression per feature.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise

_HEAD, _TAIL = 3_000, 1_000  # characters that are read of a long prompt

# Text that an application puts around every question.
_PREAMBLE = re.compile(
    r"(?:\s*(?:the following (?:is|are) (?:a )?(?:multiple[- ]choice )?questions?\b|"
    r"answer the following\b|(?:please )?answer (?:the|this|with)\b|solve the following\b|"
    r"you are an? (?:helpful|expert)\b|below is an instruction\b|(?:please )?(?:think|reason) step by step\b|"
    r"let'?s think step by step\b)[^\n:]{0,200}[\n:]+\s*)+",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\s*(?:###\s*)?(?:question|q|problem|instruction|prompt|user|human|input)\s*:\s*", re.I)
_CLOSING = re.compile(
    r"\s*(?:###\s*)?(?:\b(?:answer|a|solution|response|output|assistant)\s*:|"
    r"let'?s think step by step\.?)\s*\Z",
    re.IGNORECASE,
)
_LINE_OPTION = re.compile(r"^[ \t]*\(?([A-Ja-j])[).:][ \t]+(\S.*)$", re.MULTILINE)
_INLINE_OPTION = re.compile(r"(?:(?<=\s)|^)\(?([A-J])[).]\s+([^\n]+?)(?=\s\(?[A-J][).]\s|$)", re.MULTILINE)

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_SENTENCE_END = re.compile(r"[.!?](?=\s|\Z)")

# name -> (pattern, number of matches at full strength)
_PATTERNS: dict[str, tuple[re.Pattern[str], int]] = {
    "list_items": (re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])\s", re.MULTILINE), 5),
    "blank": (re.compile(r"__+|\.{4,}|…"), 1),
    "latex": (re.compile(r"\\[a-zA-Z]+|\$[^$\n]{1,80}\$|\^\{?\d"), 5),
    "symbols": (re.compile(r"[=<>≤≥+*/^∈∀∃→∧∨¬]"), 6),
    "fractions": (re.compile(r"\d(?:\s?/\s?\d|\s?%|\.\d)"), 4),
    "prices": (re.compile(r"[$€£]\s?\d"), 4),
    "syntax": (
        re.compile(r"```|\bdef \w+\(|\w\(\)|[{};][ \t]*$|=>|==|!=|</\w|#include|\bSELECT\b", re.MULTILINE),
        3,
    ),
    "exceptions": (re.compile(r"\b(?:NOT|EXCEPT|LEAST|FALSE|TRUE|INCORRECT)\b"), 1),
    "statements": (re.compile(r"\b(?:[Ss]tatement \d|I,? (?:and|or) II|II|III|[Oo]nly I)\b"), 2),
    "persona": (
        re.compile(r"\A\W*(?:act|pretend|imagine|picture yourself|assume the role|you are an? \w)", re.I),
        1,
    ),
}

# name -> (words, and pairs of words joined by _; number of matches at full strength). A trailing * stands for
# the usual endings.
_LEXICON: dict[str, tuple[str, int]] = {
    "programming": (
        "python javascript typescript java rust golang sql bash html css regex json yaml api docker "
        "kubernetes git linux react django pandas numpy pytorch tensorflow function* class* method* "
        "algorithm* code coding program* script* implement* refactor* debug* compil* recursi* array* "
        "tuple* string* list* tree* linked_list hash* database* server* thread* async query queries "
        "unit_test exception* bug* big_o stack queue* file* app",
        4,
    ),
    "reasoning": (
        "why prove proof derive deduce infer justify therefore suppose assume logic* puzzle* riddle* "
        "contradict* valid argument* premise* conclusion* hypothes* imply implies true false step_by "
        "follows statement*",
        4,
    ),
    "analysis": (
        "explain* analyze analyse analysis compare contrast evaluate critique discuss describe trade-off "
        "tradeoffs implication* consequence* advantage* impact* effect* relationship difference* "
        "significance how_does how_do how_can how_would pros cons",
        3,
    ),
    "design": (
        "design* plan* strategy strategies architecture system* optimiz* optimis* framework* approach* "
        "solution* develop* build* improve* requirement* model* best_way goal* process*",
        4,
    ),
    "mathematics": (
        "equation* integral* derivative* matrix matrices vector* polynomial* triangle* circle* angle* "
        "radius theorem* integer* prime* probability function* graph* root* modulo divisible digit* "
        "permutation* combination* sequence* sum product perpendicular coordinate* solve simplify compute "
        "calculate evaluate slope ratio* variance deviation positive real area volume perimeter",
        4,
    ),
    "number_words": (
        "two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty sixty "
        "hundred thousand dozen couple",
        4,
    ),
    "parts": ("half halves third thirds quarter quarters fourth fourths fifth fifths tenth twice thrice", 3),
    "conjunctions": ("and", 6),
    "than": ("than", 3),
    "relations": (
        "mother father parent parents brother brothers sister sisters son daughter uncle aunt cousin cousins "
        "siblings older younger oldest youngest taller shorter tallest shortest heavier lighter heaviest "
        "faster slower north south east west left right behind beside facing opposite upside row first last "
        "in_front next_to sits sit stands stand lies odd_one belong related relative finish",
        3,
    ),
    "how_many": ("how_many how_much how_long how_far how_old how_tall how_fast the_total the_average", 1),
    "each": ("each every per apiece respectively", 4),
    "comparison": (
        "more_than less_than fewer older younger taller longer shorter greater as_many as_much as_old "
        "times twice thrice double* triple* half third quarter fourth",
        4,
    ),
    "percent": ("percent percentage discount* interest tax tip increase* decrease* rate profit average", 3),
    "remainder": (
        "left remain* rest gave give gives lost sold sell sells bought buy buys eat eats ate use uses used",
        4,
    ),
    "together": ("total altogether in_all combined together both sum", 3),
    "money": ("dollar* cent cents cost* price* pay pays paid spend* spent earn* bill salary money", 4),
    "time": (
        "hour* minute* second* day* week* month* year* mph mile* speed monday tuesday saturday sunday "
        "morning evening",
        5,
    ),
    "conditions": ("if when unless except until after before then instead only but however", 5),
    "negation": ("not never no none except neither cannot incorrect least", 2),
    "constraints": (
        "must exactly at_least at_most no_more without ensure avoid include format limit should words "
        "sentences paragraph* bullet",
        5,
    ),
    "creative": (
        "write compose story stories poem essay blog post article speech lyrics song novel script dialogue "
        "haiku email e-mail letter slogan headline creative character* paragraph* outline engaging vivid",
        3,
    ),
    "roleplay": (
        "pretend imagine act_as roleplay role-play persona embody role_of yourself in_character style_of",
        1,
    ),
    "transformation": (
        "translat* summariz* summaris* summary rephras* paraphras* rewrit* edit* correct grammar proofread "
        "shorten convert simplify tone",
        2,
    ),
    "extraction": (
        "extract* identify classify categoriz* label* sentiment json csv table entities named list_all "
        "list_the following_text following_passage following_paragraph following_data following_review "
        "return given_the output",
        3,
    ),
    "advice": (
        "should_i how_to tips advice recommend* suggest* best idea* help_me ways_to guide itinerary recipe*",
        2,
    ),
    "first_person": ("i my me i'm i've we our", 4),
    "you": ("you your please", 3),
    "fact": (
        "who whose where when which name capital invented founded born won country film actor released "
        "first located",
        3,
    ),
    "common_sense": ("likely would might could someone people person children animal* place", 4),
    "law": (
        "court* plaintiff* defendant* statute* contract* liable jury trial law* legal crime* felony state "
        "property sued constitution* attorney",
        4,
    ),
    "medicine": (
        "patient* disease* symptom* clinical diagnosis treatment* blood drug* cell* gene* genetic protein* "
        "infection* pain therapy muscle* nerve*",
        4,
    ),
    "physics": (
        "energy force* mass velocity electron* quantum magnetic charge* wave* temperature pressure "
        "molecul* molecule* reaction* acid* atom* gas bond* circuit* voltage oxid* mol heat light",
        4,
    ),
    "economics": (
        "market* demand supply firm* price* inflation monetary gdp tax* investment* company companies "
        "cost* income audit* bank* bond* regression",
        4,
    ),
    "humanities": (
        "history war* religion* religious moral* ethic* philosoph* culture* cultural political theory "
        "government* society century king empire policy psycholog* behavior* behaviour* according_to",
        4,
    ),
    "meta_options": ("the_above of_these both neither be_determined", 1),
}
_ENDINGS = (
    "", "s", "es", "d", "ed", "ing", "ly", "al", "ic", "ical", "er", "ers", "ion", "ions", "ation", "ize",
    "izes", "ized", "ized", "izing", "ise", "ised", "ising", "e", "y", "ies", "ied", "ive", "ment", "ments",
    "is", "es", "ve", "ning", "ned", "t", "ts", "ingly", "en", "ar", "able",
)  # fmt: skip


def _lookup() -> dict[str, tuple[str, ...]]:
    """Return the features of each word, and of each pair joined by _."""
    table: dict[str, tuple[str, ...]] = {}
    for name, (entries, _) in _LEXICON.items():
        for entry in entries.split():
            forms = [entry[:-1] + ending for ending in _ENDINGS] if entry.endswith("*") else [entry]
            for form in forms:
                if name not in table.get(form, ()):
                    table[form] = (*table.get(form, ()), name)
    return table


_FEATURES_OF = _lookup()
_FIRST_OF_PAIR = frozenset(entry.partition("_")[0] for entry in _FEATURES_OF if "_" in entry)

NAMES: tuple[str, ...] = (
    "length",
    "long_words",
    "word_length",
    "sentence_length",
    "sentences",
    "variety",
    "capitals",
    "numbers",
    "number_density",
    "quantities",
    "large_numbers",
    "variables",
    "questions",
    "lines",
    "quotes",
    "non_ascii",
    "options",
    "option_length",
    "numeric_options",
    "option_share",
    *_PATTERNS,
    *_LEXICON,
)


def clip(text: str) -> str:
    """Return the beginning and the end of a very long text, and other texts unchanged."""
    if len(text) <= _HEAD + _TAIL:
        return text
    return text[:_HEAD] + "\n" + text[-_TAIL:]


def question(text: str) -> str:
    """Return *text* without what applications put around a question: preamble, "Question:", "Answer:"."""
    begin = match.end() if (match := _PREAMBLE.match(text)) else 0
    begin = match.end() if (match := _LABEL.match(text, begin)) else begin
    tail = max(len(text) - 60, begin)
    end = tail + (match.start() if (match := _CLOSING.search(text[tail:])) else len(text) - tail)
    return text[begin:end].strip() or text.strip()


def options(text: str) -> list[str]:
    """Return the choices of a multiple-choice question, on lines of their own or in a row; else nothing."""
    for pattern in (_LINE_OPTION, _INLINE_OPTION):
        found: list[str] = []
        for letter, choice in pattern.findall(text):
            if ord(letter.upper()) - ord("A") == len(found):
                found.append(choice)
        if len(found) >= 2:
            return found
    return []


def measure(text: str) -> dict[str, float]:
    """Return the strength of every feature, 0 to 1, of a prompt after `clip` and `question`."""
    original = _WORD.findall(text)
    words = [word.lower() for word in original]
    count = max(len(words), 1)
    choices = options(text)
    sentences = max(len(_SENTENCE_END.findall(text)), 1)
    numbers = _NUMBER.findall(text)
    choice_text = sum(map(len, choices))
    lengths = [len(word) for word in words]
    found = {
        "length": _between(math.log(count), math.log(5), math.log(500)),
        "long_words": _between(sum(length > 8 for length in lengths) / count, 0.0, 0.35),
        "word_length": _between(sum(lengths) / count, 3.0, 7.0),
        "sentence_length": _between(math.log(count / sentences), math.log(4), math.log(50)),
        "sentences": _between(math.log(sentences), 0, math.log(15)),
        "variety": len(set(words[:60])) / min(count, 60),
        "capitals": _between(sum(word[0].isupper() for word in original) / count, 0.0, 0.5),
        "numbers": _between(math.log1p(len(numbers)), 0.0, math.log1p(15)),
        "number_density": _between(len(numbers) / (count + len(numbers)), 0.0, 0.3),
        "large_numbers": min(sum(len(number) > 3 for number in numbers), 4) / 4,
        "variables": min(sum(len(word) == 1 and word not in "aist" for word in words), 6) / 6,
        "questions": min(text.count("?"), 3) / 3,
        "lines": min(text.count("\n"), 12) / 12,
        "quotes": min(text.count('"') + text.count("“") + text.count("”"), 6) / 6,
        "non_ascii": 0.0 if text.isascii() else _between(_foreign(text[:1000]), 0.0, 0.3),
        "options": min(len(choices), 4) / 4,
        "option_length": _between(math.log1p(choice_text / len(choices)), math.log(4), math.log(120))
        if choices
        else 0.0,
        "numeric_options": sum(any(map(str.isdigit, choice)) for choice in choices) / max(len(choices), 1),
        "option_share": min(choice_text / max(len(text), 1), 1.0),
    }
    for name, (pattern, full) in _PATTERNS.items():
        found[name] = min(len(pattern.findall(text)), full) / full
    counts = dict.fromkeys(_LEXICON, 0)
    for word in words:
        for name in _FEATURES_OF.get(word, ()):
            counts[name] += 1
    for first, second in pairwise(words):
        if first in _FIRST_OF_PAIR:
            for name in _FEATURES_OF.get(f"{first}_{second}", ()):
                counts[name] += 1
    found["quantities"] = _between(math.log1p(len(numbers) + counts["number_words"]), 0.0, math.log(20))
    for name, (_, full) in _LEXICON.items():
        found[name] = min(counts[name], full) / full
    return found


def _foreign(text: str) -> float:
    """Return the share of characters outside ASCII, 0 to 1."""

    return sum(not char.isascii() for char in text) / len(text)


def _between(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)
