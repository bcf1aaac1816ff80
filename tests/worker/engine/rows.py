"""Rows, logits and samples of them, for the sampler's tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine import fixed_math
from headrace.worker.engine.drawing.choosing import min_p_logs
from headrace.worker.engine.interface import Fault, Row, SamplingParams, Token
from headrace.worker.engine.sampling import Sampler

EOS = 0


def row_of(ids: Sequence[int] = (1, 2, 3), *, prompt: int | None = None, seed: int = 1, **params: Any) -> Row:
    """Return a row that samples after *ids*."""
    sampler = SamplingParams(seed=seed, max_tokens=100, **params)
    return Row([0], 0, len(ids), ids, len(ids) if prompt is None else prompt, True, sampler)


def draw(logits: torch.Tensor, rows: Sequence[Row]) -> list[Token | Fault]:
    return Sampler(frozenset({EOS})).sample(logits, rows)


def ids_of(tokens: Sequence[Token | Fault]) -> list[int]:
    assert all(isinstance(token, Token) for token in tokens)
    return [token.id for token in tokens if isinstance(token, Token)]


def kept_by_definition(scores: npt.NDArray[np.float32], params: SamplingParams) -> npt.NDArray[np.bool]:
    """Return whether top-k, top-p and min-p keep each token, given scores of which the greatest is 0."""
    weights = fixed_math.weight(scores)
    kept: npt.NDArray[np.bool] = scores >= min_p_logs([params.min_p])[0]
    if 0 < params.top_k < len(scores):
        least = np.sort(scores)[-params.top_k]
        kept &= scores >= least
        weights[scores < least] = 0
    if params.top_p < 1:
        likelier = np.array([weights[scores > score].sum() for score in scores])
        kept &= likelier < float(np.float32(params.top_p)) * float(weights.sum())
    return kept


def random_logits(rows: int, vocabulary: int, *, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
