"""Questions whose answers can be checked by a rule, and the rules.

`questions.jsonl` was written for this project and has its licence. It has 144 questions of eight families,
with the kind of check and the accepted answers of each. `templates.py` makes more. `dialogues.jsonl`, of the
same origin, has 56 conversations of eight families, whose last answers can be checked in the same ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.routing.execution import passes
from headrace.routing.drafts.arithmetic import final_answers

FILE = Path(__file__).with_name("questions.jsonl")
DIALOGUES = Path(__file__).with_name("dialogues.jsonl")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_WORD = re.compile(r"\w+")
_CHOICE = re.compile(r"(?:^|\banswer is:?\s*|\()\W*([A-D])(?=[.):*]|\s*$)", re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Question:
    """One question.

    kind      number: the last number of the answer counts. answer: the number that it marks as its answer
              counts, or else its last number. text: an accepted phrase occurs in it. exact: its last word
              counts. choice: the only letter A to D that it gives as an answer counts. named: of the names in
              *answers*, the first in the last sentence that has any counts. last_named: the last one anywhere
              counts. sequence: the last names are these, in this order. exactly: an accepted text and nothing
              else. json: the first JSON value equals the accepted one. python: its code passes these
              assertions
    answers   the accepted answers; for named and last_named, the first is right and the others are wrong
    before    what the user said in earlier turns; the prompt is the last turn
    """

    id: str
    family: str
    prompt: str
    kind: str
    answers: tuple[str, ...]
    before: tuple[str, ...] = ()

    @property
    def turns(self) -> tuple[str, ...]:
        """All turns of the user, oldest first."""
        return (*self.before, self.prompt)

    def right(self, said: str) -> bool:
        """Whether *said* answers the question."""
        match self.kind:
            case "number" | "answer":
                marked = final_answers(said) if self.kind == "answer" else []
                numbers = marked or [float(found.replace(",", "")) for found in _NUMBER.findall(said)]
                return bool(numbers) and abs(numbers[-1] - float(self.answers[0])) < 1e-6
            case "text":
                return any(
                    re.search(rf"\b{re.escape(answer)}\b", said, re.IGNORECASE) for answer in self.answers
                )
            case "exact":
                words = _WORD.findall(said)
                # Case matters if the answer has more than one capital.

                strict = sum(letter.isupper() for letter in self.answers[0]) > 1
                last = words[-1] if words else ""
                return last == self.answers[0] if strict else last.lower() == self.answers[0].lower()
            case "choice":
                return set(_CHOICE.findall(said)) == set(self.answers)
            case "named":
                for sentence in reversed(_SENTENCE.split(said)):
                    if named := _mentions(self.answers, sentence):
                        return named[0] == self.answers[0].lower()
                return False
            case "last_named":
                return _mentions(self.answers, said)[-1:] == [self.answers[0].lower()]
            case "sequence":
                wanted = [answer.lower() for answer in self.answers]
                return _mentions(self.answers, said)[-len(wanted) :] == wanted
            case "exactly":
                return _bare(said) in {_bare(answer) for answer in self.answers}
            case "json":
                return bool(_first_json(said) == json.loads(self.answers[0]))
            case "python":
                return passes(said, self.answers)
        raise ValueError(f"{self.id}: no such kind of check: {self.kind}")


def _mentions(names: tuple[str, ...], text: str) -> list[str]:
    """Return those of *names* that occur in *text*, in order, in lower case."""
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return [found.lower() for found in re.findall(rf"(?<![\w./-])(?:{either})(?![\w/]|\.\d)", text, re.I)]


def _bare(text: str) -> str:
    """Return *text* without a fence, quotes and a full stop around it."""
    text = re.sub(r"^```\w*\n?|\n?```$", "", text.strip())
    return re.sub(r"\s+", " ", text).strip(" \"'`.").lower()


def _first_json(text: str) -> object:
    start = min((place for place in (text.find("{"), text.find("[")) if place >= 0), default=-1)
    if start < 0:
        return None
    try:
        value: object = json.JSONDecoder().raw_decode(text[start:])[0]
    except ValueError:
        return None
    return value


def load(path: Path = FILE) -> list[Question]:
    """Load all questions or dialogues, in the order of the file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [_question(**row) for row in rows]


def _question(
    id: str, family: str, kind: str, answers: list[str], prompt: str = "", turns: Sequence[str] = ()
) -> Question:
    *before, last = turns or (prompt,)
    return Question(id, family, last, kind, tuple(answers), tuple(before))
