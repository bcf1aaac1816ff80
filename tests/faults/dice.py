"""An engine whose every token depends on all that came before it, and what its answers must be.

The echo engine says what it was asked, so a lost position could go unnoticed and a seed has no say. Here a
token is a hash of the whole history, and of the seed unless the request is greedy: one token lost, doubled or
swapped, or a seed that was not kept, changes everything after it. What a request must be answered is a plain
function, so each stream of a test is compared with its fault-free run without making one.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EOS_ID, EchoEngine
from headrace.worker.engine.interface import Fault, Row, Token

_LETTERS = b"abcdefghijklmnopqrstuvwxyz .,\n"
POISON = b"POISON"
_END = 61  # one token in so many ends the turn


def draw(ids: Sequence[int], *, seed: int, greedy: bool, may_end: bool) -> int:
    """The token after *ids*, prompt and answer so far."""
    noise = zlib.crc32(bytes(ids), 0 if greedy else zlib.crc32(seed.to_bytes(8, "little")))
    # CRC is linear; a multiplication mixes what it leaves alike.
    noise = (noise * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 24
    return EOS_ID if may_end and noise % _END == 0 else _LETTERS[noise % len(_LETTERS)]


class DiceEngine(EchoEngine):
    """The echo engine with other tokens; what it checks of its memory is checked here, too."""

    def step(self, rows: Sequence[Row], *rest: Any, **named: Any) -> list[Token | Fault | None]:
        """Compute all rows; see `Engine.step`."""
        if any(bytes(row.ids[: len(POISON)]) == POISON for row in rows):
            os._exit(13)  # as a driver's fault ends a process: without a word
        return [
            _token(row) if isinstance(result, Token) else result
            for row, result in zip(rows, super().step(rows, *rest, **named), strict=True)
        ]


def _token(row: Row) -> Token:
    params = row.params
    may_end = not params.ignore_eos and row.stop - row.prompt >= params.min_tokens
    history = row.ids[: row.stop]
    return Token(draw(history, seed=params.seed, greedy=params.temperature == 0, may_end=may_end), 0.0)


@dataclass(frozen=True)
class Expected:
    """What a request must be answered with."""

    ids: list[int]
    text: str
    reason: pb.FinishReason.ValueType


def expected(request: pb.GenerateRequest, seed: int, *, max_tokens: int = 1024) -> Expected:
    """The fault-free answer to a raw prompt in ASCII. *seed*: the one in force."""
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
