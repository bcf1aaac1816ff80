"""An engine whose tokens depend on all previous ones, and the answers that it must give.

The echo engine repeats its prompt, so that a lost position could remain undetected, and the seed has no
effect. Here a token is a hash of the whole history, and of the seed unless the request is greedy: a lost,
duplicated or swapped token, or another seed, changes every later token. The fault-free answer is a plain
function of the request, so that each stream is compared with it without a second run.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EOS_ID, EchoEngine
from headrace.worker.engine.interface import Result, Row, Token

_LETTERS = b"abcdefghijklmnopqrstuvwxyz .,\n"
POISON = b"POISON"
_END = 61  # one token in so many ends the turn


def draw(ids: Sequence[int], *, seed: int, greedy: bool, may_end: bool) -> int:
    """Return the token after *ids*, the prompt and the answer so far."""
    noise = zlib.crc32(bytes(ids), 0 if greedy else zlib.crc32(seed.to_bytes(8, "little")))
    # CRC is linear; a multiplication mixes its bits.
    noise = (noise * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 24
    return EOS_ID if may_end and noise % _END == 0 else _LETTERS[noise % len(_LETTERS)]


class DiceEngine(EchoEngine):
    """The echo engine with other tokens. The checks of its KV memory apply here, too."""

    def step(self, rows: Sequence[Row]) -> list[Result]:
        """Compute all rows; see `Engine.step`."""
        if any(bytes(row.ids[: len(POISON)]) == POISON for row in rows):
            os._exit(13)  # as a fault of a driver ends a process: without a message
        return [
            replace(_token(row), top=result.top, prompt=result.prompt)
            if isinstance(result, Token)
            else result
            for row, result in zip(rows, super().step(rows), strict=True)
        ]


def _token(row: Row) -> Token:
    params = row.params
    may_end = not params.ignore_eos and row.stop - row.prompt >= params.min_tokens
    history = row.ids[: row.stop]
    if history[-1] == EOS_ID:  # computed one step ahead of the end of the turn; nobody receives it
        return Token(EOS_ID, 0.0)
    return Token(draw(history, seed=params.seed, greedy=params.temperature == 0, may_end=may_end), 0.0)


@dataclass(frozen=True)
class Expected:
    """The answer that a request must get."""

    ids: list[int]
    text: str
    reason: pb.FinishReason.ValueType


def expected(request: pb.GenerateRequest, seed: int, *, max_tokens: int = 1024) -> Expected:
    """Return the fault-free answer to a raw ASCII prompt. *seed* is the seed in use."""
    sampling = request.sampling
    greedy = sampling.HasField("temperature") and sampling.temperature == 0
    limit = min(sampling.max_tokens or max_tokens, max_tokens)
    ids: list[int] = []
    text = ""
    for id in _answer(request, seed, greedy):
        if id == EOS_ID:
            return Expected(ids, text, pb.FINISH_REASON_STOP)
        ids.append(id)
        text += chr(id)
        found = [text.find(stop) for stop in sampling.stop if stop in text]
        if found:
            return Expected(ids, text[: min(found)], pb.FINISH_REASON_STOP_SEQUENCE)
        if len(ids) == limit:
            break
    return Expected(ids, text, pb.FINISH_REASON_LENGTH)


def _answer(request: pb.GenerateRequest, seed: int, greedy: bool) -> Iterator[int]:
    history = list(request.prompt.encode())
    prompt = len(history)
    while True:
        may_end = not request.sampling.ignore_eos and len(history) - prompt >= request.sampling.min_tokens
        id = draw(history, seed=seed, greedy=greedy, may_end=may_end)
        yield id
        history.append(id)
