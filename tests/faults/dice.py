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

import numpy as np

from headrace.grammars.matching import Bits
from headrace.v1 import generation_pb2 as pb
from headrace.worker.engine.echo import EOS_ID, EchoEngine
from headrace.worker.engine.interface import Result, Row, Token

_LETTERS = b"abcdefghijklmnopqrstuvwxyz .,\n"
POISON = b"POISON"
_END = 61  # one token in so many ends the turn


def draw(ids: Sequence[int], *, seed: int, greedy: bool, may_end: bool) -> int:
    """Return the token after *ids*, the prompt and the answer so far."""
    noise = noise_of(ids, seed=seed, greedy=greedy)
    return EOS_ID if may_end and noise % _END == 0 else _LETTERS[noise % len(_LETTERS)]


def noise_of(ids: Sequence[int], *, seed: int, greedy: bool) -> int:
    """Return a hash of *ids*, and of the seed unless the request is greedy."""
    noise = zlib.crc32(bytes(ids), 0 if greedy else zlib.crc32(seed.to_bytes(8, "little")))
    # CRC is linear; a multiplication mixes its bits.
    return (noise * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 24


class DiceEngine(EchoEngine):
    """The echo engine with other tokens. The checks of its KV memory and of grammars apply here, too."""

    def step(self, rows: Sequence[Row]) -> list[Result]:
        """Compute all rows; see `Engine.step`."""
        if any(bytes(row.ids[: len(POISON)]) == POISON for row in rows):
            os._exit(13)  # as a fault of a driver ends a process: without a message
        results = super().step(rows)
        restricted = [index for index, row in enumerate(rows) if row.params.grammar and row.sample]
        masks = self._constraints.compute(rows, restricted)
        made: list[Result] = []
        for index, (row, result) in enumerate(zip(rows, results, strict=True)):
            if isinstance(result, Token):
                token = _token(row)
                if index in masks.places:
                    token = _allowed(row, masks.bits[masks.places[index]])
                result = replace(token, top=result.top, prompt=result.prompt)
            made.append(result)
        return made


def _token(row: Row) -> Token:
    params = row.params
    may_end = not params.ignore_eos and row.stop - row.prompt >= params.min_tokens
    history = row.ids[: row.stop]
    if history[-1] == EOS_ID:  # computed one step ahead of the end of the turn; nobody receives it
        return Token(EOS_ID, 0.0)
    return Token(draw(history, seed=params.seed, greedy=params.temperature == 0, may_end=may_end), 0.0)


def _allowed(row: Row, mask: Bits) -> Token:
    """Return a token that a grammar allows, as `draw` does.

    The end of the answer, and of texts, lists and objects in it, is more likely than other tokens: otherwise
    few answers would have an end.
    """
    ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    noise = noise_of(row.ids[: row.stop], seed=row.params.seed, greedy=row.params.temperature == 0)
    closing = [id for id in (EOS_ID, *b'"]}') if id in ids]
    if closing and noise % 8 == 0:
        return Token(closing[0], 0.0)
    return Token(int(ids[noise // 8 % len(ids)]), 0.0)


@dataclass(frozen=True)
class Expected:
    """The answer that a request must get.

    calls   of tools: id, name and arguments
    """

    ids: list[int]
    text: str
    reason: pb.FinishReason.ValueType
    calls: tuple[tuple[str, str, str], ...] = ()
    reasoning: str = ""


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
