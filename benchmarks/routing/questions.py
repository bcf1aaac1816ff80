"""Questions whose answers can be checked by a rule, and the rules.

`questions.jsonl` was written for this project and has its licence: 144 questions of eight families, with the
kind of check and the accepted answers of each.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("questions.jsonl")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_WORD = re.compile(r"\w+")
_CHOICE = re.compile(r"(?:^|\banswer is:?\s*|\()\W*([A-D])(?=[.):*]|\s*$)", re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """One question.

    kind      number: the last number of the answer counts. text: an accepted phrase occurs in it. exact: its
              last word counts. choice: the only letter A to D that is given as an answer counts
    answers   what is accepted
    """

    id: str
    family: str
    prompt: str
    kind: str
    answers: tuple[str, ...]

    def right(self, said: str) -> bool:
        """Whether *said* answers the question."""
        match self.kind:
            case "number":
                numbers = [float(found.replace(",", "")) for found in _NUMBER.findall(said)]
                return bool(numbers) and numbers[-1] == float(self.answers[0])
            case "text":
                return any(
                    re.search(rf"\b{re.escape(answer)}\b", said, re.IGNORECASE) for answer in self.answers
                )
            case "exact":
                words = _WORD.findall(said)
                # Capitals are part of the question where the answer has more than one.
                strict = sum(letter.isupper() for letter in self.answers[0]) > 1
                last = words[-1] if words else ""
                return last == self.answers[0] if strict else last.lower() == self.answers[0].lower()
            case "choice":
                return set(_CHOICE.findall(said)) == set(self.answers)
        raise ValueError(f"{self.id}: no such kind of check: {self.kind}")


def load(path: Path = FILE) -> list[Question]:
    """All questions, in the order of the file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Question(**{**row, "answers": tuple(row["answers"])}) for row in rows]
