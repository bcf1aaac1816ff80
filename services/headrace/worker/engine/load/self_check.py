"""Check at start that an engine computes what the model means, and whether it does so bit for bit.

transformers' own forward pass says what the model means. The same few sequences go through the engine
alone, in a batch of ragged chunks and decodes, and resumed from the middle of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headrace.worker.engine.attention_kinds import AttentionKind, Layers
from headrace.worker.engine.flat_step import flatten
from headrace.worker.engine.interface import Row, SamplingParams, Token
from headrace.worker.engine.load.refusals import INSTEAD, UnsupportedModel
from headrace.worker.engine.plain_attention import attend
from headrace.worker.engine.torch_engine import TorchEngine
from headrace.worker.engine.transformers_attention import IMPLEMENTATION, LayerAttention

CONTEXT = 256  # tokens of the longest sequence that the check computes, where the model can hold as many
SHORTEST = 64  # tokens that a model must be able to hold, for the check to fit
ANSWER = 8
LONG = 1090  # the attention's own test goes through many blocks, whatever their size
SEQUENCES = 4
# The first prompt is the one under test; its answer goes into another block of KV memory where blocks hold
# 32, 64 or 128 tokens. For a context of CONTEXT tokens; see `_lengths`.
_LENGTHS = (125, 1, 33, 210)
_PARAMS = SamplingParams(seed=2**63 + 1, max_tokens=ANSWER, temperature=0.8, top_p=0.95, ignore_eos=True)

# How far logits may be from transformers' own, as a share of their norm. Rounding in float32 stays a
# factor of a hundred below. bfloat16 is coarser: 0.01 to 0.07 on the default models, where hiding one key
# too many makes 0.08 to 0.6; so transformers' disagreement with itself counts too.
# int8 against float32: 0.04 to 0.12, where that makes 0.4 and more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02, "int8": 0.25}

# How far a layer's attention may be from what plain torch computes in float32 of the same keys.
_ATTENTION_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True, slots=True)
class Transcript:
    """What an engine made of a sequence: all its ids, and the logits [answer, vocabulary] drawn from."""

    ids: list[int]
    logits: torch.Tensor


def blocks_needed(block_tokens: int, context: int = CONTEXT) -> int:
    """Return how many blocks of KV memory `check` wants an engine of that context length to have."""
    return SEQUENCES * -(-context // block_tokens)


def _lengths(context: int) -> tuple[int, ...]:
    """Return the prompts' lengths for a context of SHORTEST to CONTEXT tokens: each leaves room to answer."""
    return tuple(max(length * context // CONTEXT, 1) for length in _LENGTHS)


def check(engine: TorchEngine, network: Any) -> bool:
    """Compare the engine with the model's own forward pass, and with itself.

    engine    a fresh engine of `blocks_needed` blocks, for SEQUENCES sequences of SHORTEST to CONTEXT tokens
    network   its model, whose attention is switched to transformers' own for some passes

    Returns whether sequences come out bitwise the same alone, in a batch and resumed. Raises
    UnsupportedModel when the engine's logits are not the model's.
    """
    lengths = _lengths(engine.model.context_length)
    prompts = _prompts(engine.model.vocabulary_size, lengths)
    prompt = lengths[0]
    alone = _run(engine, prompts[:1], chunk=prompt)[0]
    _compare(alone, network, engine.model.dtype, "alone")
    batched = _run(engine, prompts, chunk=50)
    _compare(batched[2], network, engine.model.dtype, "in a batch")
    half = prompt + ANSWER // 2
    resumed = _run(engine, [alone.ids[:half]], chunk=half, prompt=prompt, first=1)[0]
    return (
        alone.ids == batched[0].ids == resumed.ids
        and torch.equal(alone.logits, batched[0].logits)
        and torch.equal(alone.logits[ANSWER // 2 :], resumed.logits)
    )


def _prompts(vocabulary: int, lengths: Sequence[int]) -> list[list[int]]:
    """Make a prompt of each length: the one under test, and its neighbours."""
    random = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (length,), generator=random).tolist() for length in lengths]


def _run(
    engine: TorchEngine,
    prompts: Sequence[Sequence[int]],
    *,
    chunk: int,
    prompt: int | None = None,
    first: int = 0,
) -> list[Transcript]:
    """Answer prompts together, up to ANSWER ids beyond its prompt for the first; prefill in chunks.

    prompt  how many of the first prompt's ids are its prompt; the rest is the beginning of an answer
    first   where among the blocks the first prompt's lie: what others left there must not matter
    """
    ids = [list(own) for own in prompts]
    started = [len(own) for own in ids]
    computed = [0] * len(ids)
    blocks = range(blocks_needed(engine.model.block_tokens, engine.model.context_length))
    logits: list[list[torch.Tensor]] = [[] for _ in ids]
    whole = (prompt or started[0]) + ANSWER
    while len(ids[0]) < whole:
        rows = []
        for index, own in enumerate(ids):
            stop = min(len(own), computed[index] + chunk)
            rows.append(
                Row(
                    blocks=blocks[first + index :: SEQUENCES],
                    start=computed[index],
                    stop=stop,
                    ids=own,
                    prompt=started[index] if prompt is None else prompt,
                    sample=stop == len(own),
                    params=_PARAMS,
                )
            )
            computed[index] = stop
        step = engine.compute(rows)
        for index, token, seen in zip(step.sampling, step.tokens, step.logits.clone(), strict=True):
            if not isinstance(token, Token):
                raise UnsupportedModel(
                    f"the model's logits are not finite in {engine.model.dtype}: its weights are damaged, or "
                    f"too large for that dtype; download them again, or use --dtype bfloat16 or float32"
                )
            ids[index].append(token.id)
            logits[index].append(seen)
    return [Transcript(own, torch.stack(seen)) for own, seen in zip(ids, logits, strict=True)]


@torch.inference_mode()
def check_attention(kind: AttentionKind, layers: Layers, device: torch.device, dtype: torch.dtype) -> bool:
    """Compare attention over a long sequence with plain torch, and with itself.

    Lengths at which kernels change their ways are too long for the whole model at every start.

    Returns whether a token comes out bitwise the same however long sequences are cut and batched. Raises
    UnsupportedModel when it is not what plain torch computes.
    """
    exact = [_is_exact(kind, own, device, dtype) for own in dict.fromkeys(layers.values())]
    return all(exact)


def _is_exact(kind: AttentionKind, layer: LayerAttention, device: torch.device, dtype: torch.dtype) -> bool:
    random = torch.Generator().manual_seed(1)
    shape = layer.shape
    query, key, value = (
        torch.randn(LONG, heads, width, generator=random).to(device, dtype)
        for heads, width in (
            (layer.heads, shape.key_dim),
            (shape.kv_heads, shape.key_dim),
            (shape.kv_heads, shape.value_dim),
        )
    )
    width = -(-LONG // kind.block_tokens)
    memory = kind.make_memory({0: layer}, 2 * width + 1)

    def seen_by(*parts: tuple[int, int, int]) -> torch.Tensor:
        """Attend parts (sequence, start, stop) in one step; both sequences are the same."""
        rows = [
            Row(range(2 * width - 1 - which, -1, -2), start, stop, [0] * LONG, LONG, False, _PARAMS)
            for which, start, stop in parts
        ]
        here = torch.cat([torch.arange(start, stop, device=device) for _, start, stop in parts])
        attention = kind.begin(memory, flatten(rows, kind.block_tokens))
        return attention(0, query[here], key[here], value[here], layer.masking)

    whole = torch.cat([seen_by((0, 0, 600)), seen_by((0, 600, LONG))])
    expected = attend(query, key, value, 0, layer.masking)
    error = _distance(whole.flatten(1), expected.flatten(1))
    if not error <= _ATTENTION_TOLERANCE[dtype]:
        raise UnsupportedModel(f"attention ({kind.name}) over {layer} is off by {error:.2g} of its size")
    seen_by((1, 0, LONG))
    for last in (70, 200, 500, 511, 512, 700, 1000, LONG - 1):
        alone = seen_by((0, last, last + 1))[0]
        beside = seen_by((0, last, last + 1), (1, LONG - 1, LONG))[0]
        chunked = seen_by((0, last - 40, last + 1), (1, 60, 90))[40]
        if not all(torch.equal(whole[last], own) for own in (alone, beside, chunked)):
            return False
    return True


@torch.inference_mode()
def _compare(transcript: Transcript, network: Any, dtype: str, how: str) -> None:
    """Compare with forward passes over the whole sequence by transformers' own attention functions."""
    ids = torch.tensor([transcript.ids[:-1]], device=network.device)
    kept = torch.arange(ids.shape[1] - len(transcript.logits), ids.shape[1], device=network.device)
    references = []
    try:
        for implementation in ("eager", "sdpa"):
            try:
                network.set_attn_implementation(implementation)
                logits = network(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0]
            except ValueError:  # sdpa refuses some models; every model has eager
                continue
            references.append(logits)
    finally:
        network.set_attn_implementation(IMPLEMENTATION)
    error = min(_distance(transcript.logits, reference) for reference in references)
    allowed = max(TOLERANCE[dtype], 3 * _distance(references[-1], references[0]))
    if not error <= allowed:
        raise UnsupportedModel(
            f"{type(network).__name__} computed {how} is not what transformers computes: "
            f"its logits are off by {error:.2g} of their size; {INSTEAD}"
        )


def _distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the mean over rows of |logits - reference| / |reference|."""
    reference = reference.double()
    return float(((logits.double() - reference).norm(dim=-1) / reference.norm(dim=-1)).mean())
