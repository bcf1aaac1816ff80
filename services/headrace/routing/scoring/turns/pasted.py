"""Find the question in a text that holds more: a pasted conversation, examples, a role, a long document.

The functions read a text that was clipped to its beginning and end, and take time linear in its length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from headrace.routing.scoring import prompt_features
from headrace.routing.scoring.conversation import Turn

DOCUMENT = 1_200  # characters from which on a text may be a document with a question
# Characters of a document that the question behind it does not mention. A word problem ends with one, too.
_PROSE = 1_800
_CLUES = 4  # lines of a list, from which on it is a puzzle
_QUESTION = 400  # characters of such a question, at most

_LABELS = re.compile(
    r"^[ \t]*(?:<\|(?:im_start|start_header_id)\|>|\[|\*\*|#{1,3}[ \t]*)?"
    r"(system|user|human|customer|me|assistant|ai|bot|chatgpt|gpt|claude|model|tool)"
    r"(?:<\|end_header_id\|>|\]|\*\*)?(?:[ \t]*:(?:\*\*)?|(?<=<\|im_start\|>user)|(?<=<\|im_start\|"
    r">system)|(?<=<\|im_start\|>assistant))",
    re.IGNORECASE | re.MULTILINE,
)
_ENDS = re.compile(r"<\|(?:im_end|eot_id|end_of_text|endoftext)\|>\s*$")
_ROLES = {
    **dict.fromkeys(("user", "human", "customer", "me"), "user"),
    **dict.fromkeys(("assistant", "ai", "bot", "chatgpt", "gpt", "claude", "model"), "assistant"),
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("tool",), "tool"),
}
_ASKED = re.compile(
    r"^[ \t]*(?:#{1,3}[ \t]*|\*\*)?(?:q|question|input|problem|text|review|sentence|instruction|"
    r"prompt|example|task)"
    r"(?:[ \t]+\d{1,3})?(?:\*\*)?[ \t]*[:.](?:\*\*)?[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
_ANSWERED = re.compile(
    r"^[ \t]*(?:#{1,3}[ \t]*|\*\*)?(?:a|answer|output|solution|response|label|sentiment|category|"
    r"class|translation|result)"
    r"(?:[ \t]+\d{1,3})?(?:\*\*)?[ \t]*:(?:\*\*)?",
    re.IGNORECASE | re.MULTILINE,
)
_ROLE = re.compile(
    r"\s*(?:system(?: prompt)?:\s*)?(?:you are|you're|act as|your name is|as) (?:an?|the|our|my|"
    r"chatgpt|claude|[A-Z]\w+)\b[^\n]{0,120}?"
    r"\b(?:assistant|ai|bot|chatbot|chatgpt|claude|model|tutor|teacher|expert|agent|helper|"
    r"advis[eo]r|engineer|developer|programmer|"
    r"scientist|mathematician|analyst|writer|editor|translator|professional|specialist|consultant|"
    r"coach|professor|lawyer|doctor|"
    r"physician|historian|system|support|copywriter|researcher|architect|instructor)\b",
    re.IGNORECASE,
)
# The paragraph with the role asks for something itself.
_ASKS_IN_ROLE = re.compile(
    r"\?|\b(?:please|write|create|generate|make me|give me|help me|i want|i need|i will|i'll|"
    r"your task|produce|summarize)\b",
    re.IGNORECASE,
)
_REQUESTS = re.compile(
    r"(?:\b(?:summari[sz]e|explain|translate|what|which|who|whom|whose|when|where|why|how|list|find|"
    r"extract|identify|write|"
    r"implement|describe|classify|answer|tell|give|rewrite|proofread|compare|analy[sz]e|fix|debug|"
    r"review|refactor|is|are|"
    r"does|do|did|can|could|should|correct|create|generate|compute|calculate|prove|determine|"
    r"based on|according to|"
    r"read|using|from|in)\b)",
    re.IGNORECASE,
)
_DOCUMENTS = (
    "text|article|document|passage|email|report|code|log|logs|story|paper|transcript|file|contract|"
    "conversation|data|table|"
    "essay|letter|review|notes|excerpt|abstract|paragraph|speech|post|chapter|interview|meeting|"
    "policy|agreement|dialogue"
)
_POINTS = re.compile(
    rf"\b(?:(?:this|these|the|following|below|above|my|our|attached) (?:\w+ )?(?:{_DOCUMENTS})\b|"
    rf"the (?:above|below)\b|"
    r"text like|based on the following|(?:following|below|above)\s*[:.]?\s*$)",
    re.IGNORECASE,
)
_ITEM = re.compile(r"^[ \t]*(?:\d{1,3}[.)]|[-*•])[ \t]", re.MULTILINE)
_CODE = re.compile(
    r"```|^[ \t]*(?:def|class|import|from \w+ import|function|const|let|var|public|private|#include|"
    r"package|fn|func|SELECT|Traceback)\b"
    r"|[{};][ \t]*$",
    re.MULTILINE,
)
TOOL_RESULT = re.compile(
    r"\s*(?:\[?tool(?:[ _](?:result|response|output|call))?\]?\s*[:\]]|<tool_(?:response|result)|"
    r"<function_results?|observation\s*:|"
    r"function (?:result|response|output)\s*:)",
    re.IGNORECASE,
)
_ERROR = re.compile(
    r"Traceback \(most recent call last\)|\b(?:exit(?:ed)?(?: with)?(?: code|"
    r" status)?[ :=]+[1-9]\d*|FAILED|FATAL|panic:|"
    r"Segmentation fault|command not found|No such file or directory|[Pp]ermission denied|npm ERR!|"
    r"[A-Z]\w*(?:Error|Exception)\b)"
    r"|^[ \t]*(?:error|ERROR|Error)\b[^\n]{0,40}[:\[]|\b(?:HTTP|status)[ /\d.:]*[45]\d\d\b|\b\d+ failed\b",
    re.MULTILINE,
)

# A text with an error has one of these. Finding them takes a twentieth of the time.
_ERROR_LITERALS = (
    *("rror", "RROR", "xception", "Traceback", "exit", "FAILED", "FATAL", "panic:", "fault", "not found"),
    *("such file", "denied", "ERR!", "HTTP", "status", "failed"),
)


@dataclass(frozen=True, slots=True)
class Question:
    """What a text asks.

    text      that is scored
    document  number of characters of a document that it asks about, at most what is read; 0: none
    """

    text: str
    document: int = 0


def turns_in(text: str) -> list[Turn]:
    """Return the turns of a conversation that was pasted as text; nothing for another text."""
    if ":" not in text and "<|" not in text:
        return []
    labels = list(_LABELS.finditer(text))
    roles = [_ROLES[label.group(1).lower()] for label in labels]
    if "user" not in roles or "assistant" not in roles:
        return []
    # A text with a sentence such as "Model: X200" has labels, but not in turns.
    if (roles.index("user") > roles.index("assistant") and len(roles) < 3) or len(
        text[: labels[0].start()]
    ) > 1_500:
        return []
    turns = []
    ends = [label.start() for label in labels[1:]] + [len(text)]
    for label, role, end in zip(labels, roles, ends, strict=True):
        content = _ENDS.sub("", text[label.end() : end]).strip()
        if content:
            turns.append(Turn(role, content))
    return turns if any(turn.role == "user" for turn in turns) else []


def question_in(text: str) -> Question:
    """Return what *text* asks, without a role, examples and a document around it."""
    text = _without_role(text)
    text = _without_examples(text)
    if len(text) < DOCUMENT or prompt_features.options(text):
        return Question(text)
    return _beside_document(text)


def has_error(text: str) -> bool:
    """Return whether the output of a tool, or text that quotes it, reports an error."""
    return any(map(text.__contains__, _ERROR_LITERALS)) and _ERROR.search(text) is not None


def code_in(text: str) -> str:
    """Return the code in *text*, at most 600 characters of it; empty if it has fewer than three lines."""
    if (fence := text.find("```")) >= 0:
        end = text.find("```", fence + 3)
        code = text[fence + 3 : end if end > 0 else len(text)]
    elif has_error(text) or len(_CODE.findall(text)) >= 3:
        code = text
    else:
        return ""
    code = code.strip()
    return code[:600] if code.count("\n") >= 2 or has_error(code) else ""


def _without_role(text: str) -> str:
    """Return *text* without a first paragraph that describes the assistant."""
    if (match := _ROLE.match(text)) is None:
        return text
    end = text.find("\n\n", match.end())
    if end < 0:
        end = text.find("\n", match.end())
    rest = text[end:].strip() if end > 0 else ""
    if not rest or end > _QUESTION or _ASKS_IN_ROLE.search(text, 0, end):
        return text
    return rest


def _without_examples(text: str) -> str:
    """Return the last question of *text* if it has questions with answers before it."""
    asked = list(_ASKED.finditer(text))
    if len(asked) < 2:
        return text
    answered = list(_ANSWERED.finditer(text))
    last = asked[-1]
    if not any(asked[0].end() <= match.start() < last.start() for match in answered):
        return text
    behind = next((match for match in answered if match.start() > last.end()), None)
    if behind is not None and text[behind.end() :].strip():
        return text  # The last one has its answer, too: these are examples of something else.
    question = text[last.end() : behind.start() if behind is not None else len(text)].strip()
    # A short task before the examples, such as "Classify the sentiment.", belongs to the question.
    task = text[: asked[0].start()].strip()
    if task and len(task) <= 200 and not last.group().strip().lower().startswith(("q", "problem")):
        question = f"{task}\n{question}"
    return question or text


def _beside_document(text: str) -> Question:
    """Return the question at the beginning or the end of a long text; the text if there is none."""
    first, rest = _first_part(text)
    last, before = _last_part(text)
    opens = bool(first) and _is_question(first)
    ends = bool(last) and _is_question(last)
    if opens and ends and last not in first:
        asked, document = f"{first}\n{last}", rest[: max(len(rest) - len(last), 0)]
    elif opens:
        asked, document = first, rest
    elif ends:
        asked, document = last, before
    else:
        return Question(text)
    if not _POINTS.search(asked) and not opens:
        if len(document) < _PROSE or len(_ITEM.findall(document)) >= _CLUES:
            return Question(text)
    elif len(document) < DOCUMENT // 2:
        return Question(text)
    if len(_CODE.findall(document[:2_000])) >= 5:
        return Question(f"{asked}\n```\n{document.strip()[:800]}\n```", len(document))
    return Question(asked, len(document))


def _first_part(text: str) -> tuple[str, str]:
    """Return the first paragraph or line of a text, if it is short, and the rest."""
    for end in ("\n\n", "\n", ": "):
        place = text.find(end, 0, _QUESTION)
        if place > 0:
            return text[: place + 1].strip(), text[place + len(end) :]
    return "", text


def _last_part(text: str) -> tuple[str, str]:
    """Return the last paragraph or line of a text, if it is short, and what precedes it."""
    text = text.rstrip()
    for begin in ("\n\n", "\n"):
        place = text.rfind(begin, len(text) - _QUESTION)
        if place > 0:
            return text[place:].strip(), text[:place]
    return "", text


def _is_question(text: str) -> bool:
    """Return whether a paragraph beside a document asks something about it."""
    if text.rstrip(" \"'*").endswith(("?", "？", "؟")):
        return True
    return len(text) <= _QUESTION and (
        (
            _REQUESTS.match(text.lstrip(" *#>-\"'")) is not None
            and (_POINTS.search(text) is not None or text.endswith(":"))
        )
        or (_POINTS.search(text) is not None and _REQUESTS.search(text) is not None)
    )
