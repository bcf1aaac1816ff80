"""Measure the findings for and against a draft, each from 0 to 1.

`check.py` has the weights. Findings about arithmetic apply to questions that ask for a number, findings about
code to drafts that contain code. Log-probabilities and samples add findings if they are given.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence

from headrace.routing.drafts import arithmetic
from headrace.routing.drafts.agreement import CHOSEN, agreement

# Each finding, and its text for people.
FEATURES: dict[str, str] = {
    "empty": "the draft is empty",
    "cut_off": "the draft was cut off before its end",
    "open_end": "the draft ends in the middle of a sentence",
    "no_answer": "the prompt asks for a number and the draft marks no final answer",
    "no_number": "the prompt asks for a number and the draft has none",
    "refusal": "the draft refuses or says that it cannot answer",
    "hedging": "the draft hedges",
    "second_thoughts": "the draft corrects itself",
    "wrong_equation": "an equation in the draft is wrong",
    "wrong_equations": "several equations in the draft are wrong",
    "answer_unsupported": "the final answer is none of the numbers that the draft computed",
    "answers_differ": "the draft gives different final answers",
    "fraction": 'the final answer to a "how many" question is not a whole number',
    "odd_digits": "numbers in the draft have more decimals than the question suggests",
    "negative": "the final answer is negative",
    "echo": "the final answer is a number of the question, unchanged",
    "unused_numbers": "the draft does not use all numbers of the question",
    "new_numbers": "the draft begins with numbers that are not in the question",
    "algebra": "the draft uses unknowns",
    "no_working": "the draft gives a number without working",
    "many_steps": "the draft needs many steps",
    "long_question": "the question is long",
    "long_draft": "the draft is long for its question",
    "short_draft": "the draft is short for its question",
    "repetition": "the draft repeats itself",
    "runs_on": "the draft continues with a question of its own",
    "broken_code": "code in the draft does not parse",
    "no_code": "the prompt asks for code and the draft has none",
    "no_choice": "the prompt asks for a choice and the draft names none",
    "off_topic": "the draft shares no words with the question",
    "unsure": "the model was unsure of its tokens",
    "unsure_at_worst": "the model was unsure of its least likely tokens",
    "samples_agree": "other answers of the model agree with the draft",
    "samples_differ": "other answers of the model differ from the draft",
}

# The text may be anything and the router waits for the result, so no pattern may take quadratic time on a run
# of blanks: hence [^\S\n] after ^ instead of \s, and possessive repeats. The worst text of this length takes
# 40 ms.
_MAX_CHARACTERS = 10_000

_ASKS_NUMBER = re.compile(
    r"\bhow (?:many|much|long|far|old|tall|fast|often|big|heavy|deep|wide|high|large)\b|"
    r"\bcalculate\b|\bcompute\b|"
    r"\bwhat (?:is|was|will be|would be|are) (?:the |his |her |their |its )?"
    r"(?:\w+ ){0,3}?(?:total|sum|average|mean|number|amount|cost|price|difference|ratio|percent\w*|value|"
    r"area|volume|perimeter|distance|speed|age|profit|weight|length|height|probability|product|remainder|time)\b|"
    r"\bwhat (?:percent\w*|fraction|number)\b|\d\s*[-+*/×÷]\s*\d",
    re.IGNORECASE,
)
_COUNTED = re.compile(r"\bhow many\b", re.IGNORECASE)
_CONTINUOUS = re.compile(
    r"\bhow many (?:more |fewer |less |total )?(?:hours?|minutes?|days?|weeks?|months?|years?|miles?|"
    r"pounds?|ounces?|gallons?|liters?|litres?|cups?|inches|feet|yards?|meters?|metres?|kilomet\w+|grams?|kilograms?|dollars?|"
    r"percent\w*|times|tons?|acres|square|cubic|calories|kg|cm)\b",
    re.IGNORECASE,
)
_ASKS_CODE = re.compile(
    r"\b(?:write|implement|create|complete|fix|debug|give|code)\b.{0,60}"
    r"\b(?:function|program|script|class|method|code|query|regex|algorithm)\b",
    re.IGNORECASE | re.DOTALL,
)
_CHOICES = re.compile(r"^[^\S\n]*\(?([A-J])[).:]\s+\S", re.MULTILINE)
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|i (?:cannot|can't|can not|do not have|don't have|don't know|"
    r"do not know|could not|couldn't)|as an ai|cannot be (?:determined|answered|calculated|solved|found)|"
    r"can't be (?:determined|calculated|solved)|(?:not|isn't) (?:enough|sufficient) information|"
    r"insufficient information|not (?:provided|specified|given|stated|mentioned)|(?:is|are) missing|"
    r"(?:isn't|not) possible to|impossible to|no (?:way|information) (?:to|about|on)|"
    r"need (?:more|additional) information|without (?:knowing|more|additional)|"
    r"doesn't (?:specify|provide|say|mention)|does not (?:specify|provide|say|mention))\b",
    re.IGNORECASE,
)
_HEDGING = re.compile(
    r"\b(?:assum(?:e|es|ed|ing)|approximately|roughly|maybe|perhaps|probably|possibly|"
    r"might be|could be|it seems|seems to|appears to|presumably|unclear|ambiguous|depends|not sure|i think|"
    r"i believe|i guess|if we|round(?:ed|ing)?|estimate[ds]?|unfortunately)\b|≈|\\approx",
    re.IGNORECASE,
)
_SECOND_THOUGHTS = re.compile(
    r"\b(?:wait|actually|correction|mistake|my (?:bad|apolog\w+)|apologi[sz]e|"
    r"let me (?:re\w+|correct|try again)|"
    r"let's (?:re-?\w*(?:check|do|think|calculate|consider|examine)|try again|correct)|re-?calculat\w+|"
    r"re-?evaluat\w+|oops|on second thought|that(?:'s| is) (?:not|in)correct|contradict\w*|inconsisten\w+|"
    r"doesn't make sense|does not make sense|(?:is|was) (?:not|in)correct|"
    r"there (?:is|must be|seems to be) an? (?:error|mistake|typo)|not possible|impossible)\b",
    re.IGNORECASE,
)
_ALGEBRA = re.compile(
    r"\b(?:let(?:'s)? (?:\w+ ){0,6}(?:be|as|call|denote|represent)|solve for|substitut\w+|equations?|"
    r"variable|unknowns?)\b|(?<![\w.])\d*[a-wyz]\s*[=+*-]\s*\d|(?<![\w.])\d+[a-z](?=\s*[=+-])",
)
_RUNS_ON = re.compile(
    r"^[^\S\n]*(?:question|q|problem|user|human|###\s*(?:question|instruction|problem))\s*\d*\s*:",
    re.IGNORECASE | re.MULTILINE,
)
_FENCE = re.compile(r"```[ \t]*+(\w*+)[^\n]*+\n(.*?)(?:```|\Z)", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]{3,}")
_SMALL = {
    word: float(value)
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
        ]
    )
} | {"dozen": 12.0, "half": 2.0, "twice": 2.0, "double": 2.0, "triple": 3.0, "thrice": 3.0, "quarter": 4.0}


def measure(
    prompt: str,
    draft: str,
    *,
    finished: bool,
    logprobs: Sequence[float] | None,
    samples: Sequence[str] = (),
) -> dict[str, float]:
    """Return the strength of every finding, 0 to 1. The arguments are those of `DraftChecker.check`."""
    prompt, whole = prompt[-_MAX_CHARACTERS:], draft.strip()
    draft, samples = whole[:_MAX_CHARACTERS], [sample[:_MAX_CHARACTERS] for sample in samples]
    found = dict.fromkeys(FEATURES, 0.0)
    found["cut_off"] = 0.0 if finished else 1.0
    if logprobs:
        found |= doubts(logprobs)
    if not draft:
        return found | {"empty": 1.0}
    onward = _RUNS_ON.search(draft, 1)
    if onward and onward.start() > 0:  # the rest answers a question that nobody asked
        found["runs_on"] = 1.0
        draft = draft[: onward.start()].strip() or draft
    found |= _form(prompt, draft)
    asks_code = bool(_ASKS_CODE.search(prompt))
    asks_number, chooses = asks_for_number(prompt), asks_for_choice(prompt)
    if asks_number:
        found |= _number(prompt, draft)
    if asks_code:
        found["no_code"] = 0.0 if _looks_like_code(draft) else 1.0
    found["broken_code"] = _broken_code(draft)
    if chooses:
        found["no_choice"] = 0.0 if _chooses(prompt, draft) else 1.0
    agree = agreement(prompt, draft, samples, number=asks_number, choice=chooses)
    if agree is not None:
        found["samples_agree"], found["samples_differ"] = agree, 1 - agree
    return found


def doubts(logprobs: Sequence[float]) -> dict[str, float]:
    """Return the strength of the findings about log-probabilities, of which there is at least one."""
    surprise = sorted(-max(value, -20.0) for value in logprobs)
    worst = surprise[-max(1, len(surprise) // 20) :]
    return {
        "unsure": _between(sum(surprise) / len(surprise), 0.05, 1.0),
        "unsure_at_worst": _between(sum(worst) / len(worst), 0.7, 4.0),
    }


def asks_for_number(prompt: str) -> bool:
    """Whether the answer to a prompt is a number."""
    prompt = prompt[-_MAX_CHARACTERS:]
    return bool(_ASKS_NUMBER.search(prompt) and not _CHOICES.search(prompt) and not _ASKS_CODE.search(prompt))


def asks_for_choice(prompt: str) -> bool:
    """Whether a prompt offers choices with letters."""
    return len(set(_CHOICES.findall(prompt[-_MAX_CHARACTERS:]))) >= 2


def _form(prompt: str, draft: str) -> dict[str, float]:
    """Return the findings that apply to any answer."""
    asked, answered = len(prompt.split()), len(draft.split())
    refusals = len(_REFUSAL.findall(draft))
    topics = {word.lower()[:6] for word in _WORD.findall(prompt)}
    spoken = {word.lower()[:6] for word in _WORD.findall(draft)}
    return {
        "open_end": 1.0 if _open_end(draft) else 0.0,
        "refusal": min(refusals, 2) / 2,
        "hedging": min(len(_HEDGING.findall(draft)), 3) / 3,
        "second_thoughts": min(len(_SECOND_THOUGHTS.findall(draft)), 2) / 2,
        "long_question": _between(math.log(max(asked, 1)), math.log(20), math.log(120)),
        "long_draft": _between(math.log((answered + 1) / (asked + 20)), math.log(1.0), math.log(6.0)),
        "repetition": _repetition(draft),
        "off_topic": 1.0 if len(topics) >= 8 and answered >= 20 and not topics & spoken else 0.0,
    }


def _number(prompt: str, draft: str) -> dict[str, float]:
    """Return the findings that apply to an answer to a question for a number."""
    asked = {abs(value) for value in arithmetic.numbers(prompt)}
    answers = arithmetic.final_answers(draft)
    text = arithmetic.plain(draft)
    written = arithmetic.numbers(text)
    if not written:
        return {"no_number": 1.0, "no_answer": 1.0}
    equations = arithmetic.equations(draft)
    wrong = sum(not equation.holds for equation in equations)
    answer = answers[-1] if answers else written[-1]
    results = [equation.right for equation in equations]
    spoken = {_SMALL[word] for word in re.findall(r"[a-z]+", prompt.lower()) if word in _SMALL}
    used = {abs(value) for value in written}
    used |= {value / 100 for value in used} | {value * 100 for value in used}
    known = asked | spoken | {0.0, 1.0, 2.0, 7.0, 10.0, 12.0, 24.0, 30.0, 52.0, 60.0, 100.0, 365.0}
    unused = sum(value not in used for value in asked)
    worked_out = len({abs(value) for value in written} - known)
    first = written[: max(2, len(asked))]
    return {
        "no_answer": 0.0 if answers or _concludes(draft) else 1.0,
        "wrong_equation": 1.0 if wrong else 0.0,
        "wrong_equations": 1.0 if wrong > 1 else 0.0,
        "answer_unsupported": _unsupported(answer, results),
        "answers_differ": 1.0 if len({round(value, 2) for value in answers}) > 1 else 0.0,
        "fraction": 1.0
        if _COUNTED.search(prompt) and not _CONTINUOUS.search(prompt) and not answer.is_integer()
        else 0.0,
        "odd_digits": 1.0 if re.search(r"\d\.\d{3,}", text) and not re.search(r"\.\d{3}", prompt) else 0.0,
        "negative": 1.0 if answer < 0 else 0.0,
        "echo": 1.0 if answer in asked and answer > 2 else 0.0,
        "unused_numbers": min(unused / max(len(asked), 1) * 1.5, 1.0),
        "new_numbers": min(sum(abs(value) not in known for value in first[:2]), 2) / 2,
        "algebra": min(len(_ALGEBRA.findall(draft)), 4) / 4,
        "no_working": 1.0 if not equations and worked_out <= 1 else 0.0,
        "many_steps": _between(max(len(set(results)), worked_out), 3, 12),
        "short_draft": _between(-math.log((len(draft.split()) + 1) / (len(prompt.split()) + 1)), 0.7, 2.3),
    }


def _concludes(draft: str) -> bool:
    """Whether the last sentence is complete and contains a number."""
    last = re.split(r"(?<=[.!?])\s+|\n+", draft.strip())[-1]
    return bool(re.search(r"\d", last)) and not _open_end(draft)


def _unsupported(answer: float, results: Sequence[float]) -> float:
    """Return 1 if the answer is none of the computed results, 0.4 if none of the last two, else 0."""
    if not results:
        return 0.0
    near = [abs(answer - result) <= 0.01 * max(abs(answer), abs(result)) + 1e-9 for result in results]
    if not any(near):
        return 1.0
    return 0.0 if any(near[-2:]) else 0.4


def _open_end(draft: str) -> bool:
    """Whether the draft ends where no sentence, number, list or code ends."""
    if draft.count("```") % 2:
        return True
    line = draft.rsplit("\n", 1)[-1].strip()
    if not line or line.endswith(
        (".", "!", "?", "`", '"', "'", ")", "]", "}", "*", "$", "|", "”", ">", "%", "…")
    ):
        return line.endswith(("...", "…"))
    if line[-1] in ",:;(=+-/×":
        return True
    # A short last line may be a bare answer or a list item; a long one without a full stop was cut off.
    return len(line.split()) > 12 and not line[-1].isdigit()


def _repetition(draft: str) -> float:
    """Return 0 if hardly any run of six words is repeated, 1 if half of them are."""
    words = draft.split()
    if len(words) < 30:
        return 0.0
    runs = Counter(tuple(words[place : place + 6]) for place in range(len(words) - 5))
    repeated = sum(count - 1 for count in runs.values()) / max(sum(runs.values()), 1)
    return _between(repeated, 0.05, 0.5)


def _looks_like_code(draft: str) -> bool:
    return bool(
        "```" in draft
        or re.search(
            r"^[^\S\n]*(?:def|class|import|from|SELECT|function|public|#include|const|let|var)\b", draft, re.M
        )
        or re.search(r"[{};]\s*$", draft, re.M)
        or any(re.search(r"\w\(", line.rpartition(")")[0]) for line in draft.split("\n"))
    )


def _broken_code(draft: str) -> float:
    """Return 1 if a block of Python code does not parse, or of code that seems to be Python."""

    blocks = [(language.lower(), body) for language, body in _FENCE.findall(draft)]
    if not blocks and re.match(r"\s*(?:def|class|import|from)\s", draft):
        blocks = [("python", draft)]
    for language, body in blocks:
        looks = language in ("python", "py", "python3") or (
            not language and re.search(r"^[^\S\n]*def \w+\(.*:\s*$", body, re.M)
        )
        if looks and ">>>" not in body and not _parses(body):
            return 1.0
    return 0.0


def _parses(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _chooses(prompt: str, draft: str) -> bool:
    """Whether the draft names one of the choices by its letter, or repeats one of them."""
    if CHOSEN.search(draft) or re.fullmatch(r"\W*[A-J]\W*", draft):
        return True
    options = re.findall(r"^[^\S\n]*\(?[A-J][).:]\s+(.+)$", prompt, re.MULTILINE)
    return any(option.strip(" .").lower() in draft.lower() for option in options if option.strip(" ."))


def _between(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)
