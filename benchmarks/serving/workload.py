"""Read the workload: prompts, with the exact length of each answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("workload.json")


@dataclass(frozen=True)
class Request:
    """One request: greedy, end-of-turn ignored, exactly *output_tokens* tokens.

    prompt       raw text, chat template included
    prompt_ids   the same as ids of the measured model
    """

    id: int
    prompt: str
    prompt_ids: tuple[int, ...]
    output_tokens: int


def load(encode: Callable[[str], Sequence[int]], file: Path = FILE) -> list[Request]:
    """Read a workload file: {"requests": [{"id", "prompt", "output_tokens"}, ...]}."""
    return [
        Request(entry["id"], entry["prompt"], tuple(encode(entry["prompt"])), entry["output_tokens"])
        for entry in json.loads(file.read_text())["requests"]
    ]


def selection(requests: Sequence[Request], concurrency: int) -> Sequence[Request]:
    """Return the requests for a concurrency: a quarter of them for one client, otherwise all."""
    return requests[: max(1, len(requests) // 4)] if concurrency == 1 else requests


def model_tokenizer(folder: Path) -> Callable[[str], list[int]]:
    """Return the encoder of a model folder. It parses special tokens in the text, and adds none."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
