"""Check at start that an engine computes the model correctly, and whether it is batch-invariant.

The reference is transformers' own forward pass. The engine computes the same few sequences alone, in a batch
of ragged chunks and decodes, and resumed from the middle of an answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from headrace.worker.engine.attention_kinds import AttentionKind, Layers
from headrace.worker.engine.flat_step import flatten
from headrace.worker.engine.interface import Row, SamplingParams, Token
from headrace.worker.engine.load.refusals import SEE_MODELS, UnsupportedModel
from headrace.worker.engine.plain_attention import attend
from headrace.worker.engine.torch_engine import TorchEngine
from headrace.worker.engine.transformers_attention import IMPLEMENTATION, LayerAttention

CONTEXT = 256  # tokens of the longest sequence of the check, if the model supports as many
SHORTEST = 64  # the smallest context length that the check supports
ANSWER = 8
LONG = 1090  # tokens in the check of attention: many blocks of any size
SEQUENCES = 4
# The first prompt is the one under test. Its answer starts a new block of KV memory where blocks have 32, 64
# or 128 tokens. The lengths are for a context of CONTEXT tokens; see `_lengths`.
_LENGTHS = (125, 1, 33, 210)
_PARAMS = SamplingParams(seed=2**63 + 1, max_tokens=ANSWER, temperature=0.8, top_p=0.95, ignore_eos=True)

# The largest accepted error of logits, relative to the norm of transformers' own. Rounding in float32 causes
# a hundredth of it. bfloat16 is coarser: 0.01 to 0.07 on the default models, where hiding one key too many
# causes 0.08 to 0.6; so the difference between two implementations of transformers counts too.
# int8 against float32: 0.04 to 0.12, where one hidden key causes 0.4 and more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02, "int8": 0.25}

# The largest accepted relative error of attention, compared with plain torch in float32 on the same keys.
_ATTENTION_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True, slots=True)
class Transcript:
    """The result for one sequence: all its ids, and the logits [answer, vocabulary] that were sampled."""

    ids: list[int]
    logits: torch.Tensor


def blocks_needed(block_tokens: int, context: int = CONTEXT) -> int:
    """Return how many blocks of KV memory `check_model` needs for a context length."""
    return SEQUENCES * -(-context // block_tokens)


def _lengths(context: int) -> tuple[int, ...]:
    """Return prompt lengths for a context of SHORTEST to CONTEXT tokens; each leaves space for the answer."""
    return tuple(max(length * context // CONTEXT, 1) for length in _LENGTHS)


def check_model(engine: TorchEngine, network: Any, *, concurrent: bool = False) -> bool:
    """Compare an engine with transformers' own forward pass, and with itself.

    engine       a fresh engine of `blocks_needed` blocks, for SEQUENCES sequences of SHORTEST to CONTEXT
                 tokens
    network      its model; some passes use the attention of transformers
    concurrent   the engine does not use the network, so both can compute at the same time

    Returns whether results are bit-identical alone, in a batch and resumed. Raises UnsupportedModel if the
    logits of the engine differ from those of the model.
    """
    lengths = _lengths(engine.model.context_length)
    prompts = _prompts(engine.model.vocabulary_size, lengths)
    prompt, dtype = lengths[0], engine.model.dtype
    half = prompt + ANSWER // 2
    with ThreadPoolExecutor(max_workers=1) as thread:
        comparisons: list[Future[None]] = []

        def compare(transcript: Transcript, how: str) -> None:
            comparisons.append(thread.submit(_compare, transcript, network, dtype, how))
            if not concurrent:
                comparisons[-1].result()

        alone = _run(engine, prompts[:1], chunk=prompt)[0]
        compare(alone, "alone")
        batched = _run(engine, prompts, chunk=50)
        compare(batched[2], "in a batch")
        resumed = _run(engine, [alone.ids[:half]], chunk=half, prompt=prompt, first=1)[0]
        for comparison in comparisons:
            comparison.result()
    return (
        alone.ids == batched[0].ids == resumed.ids
        and torch.equal(alone.logits, batched[0].logits)
        and torch.equal(alone.logits[ANSWER // 2 :], resumed.logits)
    )


def _prompts(vocabulary: int, lengths: Sequence[int]) -> list[list[int]]:
    """Make a prompt of each length: the one under test, and the rest of the batch."""
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
    """Answer prompts in one batch, until the first has ANSWER ids after its prompt; prefill in chunks.

    prompt  number of prompt ids of the first sequence; the rest is the start of its answer
    first   offset of the blocks that the first sequence uses; their previous content must not matter
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
        for index, token, sampled in zip(step.sampling, step.tokens, step.logits.clone(), strict=True):
            if not isinstance(token, Token):
                raise UnsupportedModel(
                    f"the model's logits are not finite in {engine.model.dtype}: its weights are damaged or "
                    f"too large for this dtype; download them again, or use --dtype bfloat16 or float32"
                )
            ids[index].append(token.id)
            logits[index].append(sampled)
    return [Transcript(own, torch.stack(steps)) for own, steps in zip(ids, logits, strict=True)]


@torch.inference_mode()
def check_attention(kind: AttentionKind, layers: Layers, device: torch.device, dtype: torch.dtype) -> bool:
    """Compare attention over a long sequence with plain torch, and with itself.

    Sequences that are long enough for kernels to change their algorithm would take too long with the whole
    model.

    Returns whether the result of a token is bit-identical in all chunks and batches. Raises UnsupportedModel
    if it differs from plain torch.
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

    def attend_parts(*parts: tuple[int, int, int]) -> torch.Tensor:
        """Compute parts (sequence, start, stop) in one step; both sequences are equal."""
        rows = [
            Row(range(2 * width - 1 - which, -1, -2), start, stop, [0] * LONG, LONG, False, _PARAMS)
            for which, start, stop in parts
        ]
        tokens = torch.cat([torch.arange(start, stop, device=device) for _, start, stop in parts])
        attention = kind.begin(memory, flatten(rows, kind.block_tokens))
        return attention(0, query[tokens], key[tokens], value[tokens], layer.masking)

    whole = torch.cat([attend_parts((0, 0, 600)), attend_parts((0, 600, LONG))])
    expected = attend(query, key, value, 0, layer.masking)
    error = _distance(whole.flatten(1), expected.flatten(1))
    if not error <= _ATTENTION_TOLERANCE[dtype]:
        raise UnsupportedModel(f"attention ({kind.name}) over {layer} has a relative error of {error:.2g}")
    attend_parts((1, 0, LONG))
    for last in (70, 200, 500, 511, 512, 700, 1000, LONG - 1):
        alone = attend_parts((0, last, last + 1))[0]
        beside = attend_parts((0, last, last + 1), (1, LONG - 1, LONG))[0]
        chunked = attend_parts((0, last - 40, last + 1), (1, 60, 90))[40]
        if not all(torch.equal(whole[last], own) for own in (alone, beside, chunked)):
            return False
    return True


@torch.inference_mode()
def _compare(transcript: Transcript, network: Any, dtype: str, how: str) -> None:
    """Compare with forward passes over the whole sequence, with transformers' own attention functions."""
    ids = torch.tensor([transcript.ids[:-1]], device=network.device)
    kept = torch.arange(ids.shape[1] - len(transcript.logits), ids.shape[1], device=network.device)
    try:
        reference = _reference(network, "eager", ids, kept)
        error, allowed = _distance(transcript.logits, reference), TOLERANCE[dtype]
        if not error <= allowed:
            # Some models do not support sdpa; every model supports eager.
            with contextlib.suppress(ValueError):
                other = _reference(network, "sdpa", ids, kept)
                error = min(error, _distance(transcript.logits, other))
                allowed = max(allowed, 3 * _distance(other, reference))
    finally:
        network.set_attn_implementation(IMPLEMENTATION)
    if not error <= allowed:
        raise UnsupportedModel(
            f"{type(network).__name__} computed {how} differs from transformers: "
            f"its logits have a relative error of {error:.2g}; {SEE_MODELS}"
        )


def _reference(network: Any, implementation: str, ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the logits [kept, vocabulary] of transformers' forward pass over ids [1, tokens]."""
    network.set_attn_implementation(implementation)
    logits: torch.Tensor = network(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0]
    return logits


def _distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the mean over rows of |logits - reference| / |reference|."""
    reference = reference.double()
    return float(((logits.double() - reference).norm(dim=-1) / reference.norm(dim=-1)).mean())
