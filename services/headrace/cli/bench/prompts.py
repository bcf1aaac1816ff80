"""Read the prompts of a benchmark: the built-in ones, or a file of the user.

A prompt is found by the number of its request. The measured requests count up from 0, and those before them
(the test, the warm-up) count down from -1, so that they use other prompts as long as there are enough.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from headrace.cli.files.rows import BadRow, read_rows
from headrace.routing.scoring.conversation import turns_of_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# The number of tokens that an answer must have, under the names that data sets use.
_EXACT_FIELDS = ("output_len", "output_tokens", "n_out")
_MAX_TOKENS = 1_000_000


@dataclass(frozen=True)
class Prompt:
    """What to send.

    turns        (role, content), oldest first
    max_tokens   most tokens of the answer; 0 if the prompt has no limit of its own
    exact        whether the answer shall have exactly that many: the model's end of turn is ignored
    """

    turns: tuple[tuple[str, str], ...]
    max_tokens: int = 0
    exact: bool = False

    @property
    def text(self) -> str | None:
        """The text if it is a single message, which can be continued without a chat template."""
        return self.turns[0][1] if len(self.turns) == 1 else None


class Prompts(Protocol):
    """The prompts of a run, by the number of the request; any integer is one."""

    def __call__(self, number: int) -> Prompt:
        """Return the prompt of a request."""


@dataclass(frozen=True)
class ListedPrompts:
    """Prompts in their order, which start again after the last one.

    max_tokens   most tokens of the answers to prompts without a limit of their own
    output_len   exact number of tokens of all answers; None: as the prompts say
    ignore_eos   whether all answers continue to their limit
    """

    listed: Sequence[Prompt]
    max_tokens: int
    output_len: int | None = None
    ignore_eos: bool = False

    def __call__(self, number: int) -> Prompt:
        """Return the prompt of a request, with its limits."""
        prompt = self.listed[number % len(self.listed)]
        if self.output_len is not None:
            return replace(prompt, max_tokens=self.output_len, exact=True)
        return replace(
            prompt, max_tokens=prompt.max_tokens or self.max_tokens, exact=prompt.exact or self.ignore_eos
        )


def built_in(seed: int) -> list[Prompt]:
    """Return the prompts that come with Headrace, in an order by *seed*."""
    text = files("headrace.cli.bench").joinpath("prompts.jsonl").read_text(encoding="utf-8")
    found = [_prompt(json.loads(line), "prompts.jsonl") for line in text.splitlines()]
    random.Random(seed).shuffle(found)
    return found


def read_prompts(path: str) -> list[Prompt]:
    """Read a file of prompts, in its order; "-" is standard input.

    JSON Lines with `prompt` or `messages`, and optionally `max_tokens` or the exact number of tokens of the
    answer as `output_len`, `output_tokens` or `n_out`. A name that ends in .json is one document with a list
    `requests` of such objects. Raises BadRow.
    """
    rows: Iterable[dict[str, Any]] = (
        _document(Path(path)) if path.endswith(".json") else read_rows(path, (), turns=True)
    )
    name = "standard input" if path == "-" else path
    found = [_prompt(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]
    if not found:
        raise BadRow(f"{name} has no prompts")
    return found


def _document(path: Path) -> list[dict[str, Any]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadRow(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise BadRow(f"{path}: not JSON: {error}") from error
    rows = document.get("requests") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadRow(
            f"{path}: a .json file must be an object with a list 'requests' of objects; for one object per "
            "line, name the file .jsonl"
        )
    return rows


def _prompt(row: dict[str, Any], where: str) -> Prompt:
    try:
        turns = tuple((turn.role, turn.text) for turn in turns_of_row(row))
    except ValueError as error:
        raise BadRow(f"{where}: {error}") from None
    if not any(text.strip() for _, text in turns):
        raise BadRow(f"{where}: the prompt is empty")
    exact = next((name for name in _EXACT_FIELDS if row.get(name) is not None), None)
    field = exact or "max_tokens"
    value = row.get(field)
    if value is None:
        return Prompt(turns)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_TOKENS:
        raise BadRow(f"{where}: field {field!r} must be an integer from 1 to {_MAX_TOKENS}")
    return Prompt(turns, value, exact is not None)
