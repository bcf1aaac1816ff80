"""The workload of nano-vLLM's benchmark (GeeeekExplorer/nano-vllm, bench.py): the same numbers, of seed 0."""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.gpu.shapes import FIRST_WORD, Shape

COUNT = 256
TEMPERATURE = 0.6
_LENGTHS = (100, 1024)  # of prompts and answers: 142,827 and 133,966 tokens in all
_TINY_COUNT, _TINY_LENGTHS = 4, (3, 6)
_IDS = 10_000


@dataclass(frozen=True)
class Request:
    """A prompt, and the exact length of its answer."""

    ids: tuple[int, ...]
    tokens: int


def workload(shape: Shape, share: float, *, tiny: bool = False) -> list[Request]:
    """Return a share of the requests, the first ones.

    The ids are those of words, so that the same prompts can be written as text; nano-vLLM's are numbers from
    0 to 10,000.

    tiny   few and short requests, for a rehearsal
    """
    drawn = random.Random(0)
    count, lengths = (_TINY_COUNT, _TINY_LENGTHS) if tiny else (COUNT, _LENGTHS)
    words = shape.vocabulary - 1 - FIRST_WORD
    # In the order in which nano-vLLM draws: all prompts, then all lengths of answers.
    prompts = [[drawn.randint(0, _IDS) % words for _ in range(drawn.randint(*lengths))] for _ in range(count)]
    answers = [drawn.randint(*lengths) for _ in range(count)]
    requests = [
        Request(tuple(FIRST_WORD + number for number in prompt), tokens)
        for prompt, tokens in zip(prompts, answers, strict=True)
    ]
    return requests[: max(1, round(count * share))]
