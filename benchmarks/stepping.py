"""Make rows to run an engine step by step without a scheduler, for timing and for reading logits."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.worker.engine.interface import ModelInfo, Row, SamplingParams

_GREEDY = SamplingParams(seed=0, max_tokens=1 << 30, temperature=0.0, ignore_eos=True)


def row(model: ModelInfo, sequence: int, start: int, ids: Sequence[int], *, room: int) -> Row:
    """Return the row that computes `ids[start:]` of one of several sequences, and samples.

    sequence   its number; each has its own blocks of KV memory
    room       most tokens that any of the sequences will have, the same in every call
    """
    each = -(-room // model.block_tokens)
    blocks = range(sequence * each, (sequence + 1) * each)
    return Row(blocks=blocks, start=start, stop=len(ids), ids=ids, prompt=1, sample=True, params=_GREEDY)
