"""Decide the size of KV memory once the model is loaded, before the worker is ready.

The largest possible step runs over a memory of a few blocks, to measure the peak memory of activations,
logits and sampling. The memory that is available beyond that peak is divided into blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from headrace.validation import MAX_TOP_LOGPROBS
from headrace.worker.engine.interface import UNSCORED, Row, SamplingParams
from headrace.worker.engine.load.devices import Target
from headrace.worker.engine.load.free_memory import free_bytes, peak_bytes
from headrace.worker.engine.load.refusals import LoadingError

# The share of available memory that KV memory takes. On the CPU it leaves space for other workers of the
# machine, whose KV memory counts as available until it is first written.
_CPU_SHARE, _GPU_SHARE = 0.25, 0.9

_PARAMS = SamplingParams(
    seed=1,
    max_tokens=1,
    temperature=1.0,
    top_p=0.9,
    frequency_penalty=0.1,
    logprobs=True,
    top_logprobs=MAX_TOP_LOGPROBS,
    prompt_logprobs=MAX_TOP_LOGPROBS,
    ignore_eos=True,
)
_UNFILTERED = dataclasses.replace(_PARAMS, top_p=1.0)

# Places of tokens in KV memory are int32 numbers in the inputs of a step. Only models of a few megabytes
# could have more of them.
_MOST_TOKENS = 2**31 - 1


def largest_step(
    *,
    step_tokens: int,
    max_running: int,
    context_length: int,
    block_tokens: int,
    params: Sequence[SamplingParams] = (_PARAMS,),
    scored: bool = True,
) -> list[Row]:
    """Make rows that take as much memory as any step can: all sequences sample, one is a long chunk.

    params   of the rows in turn
    scored   whether the engine computes log-probabilities of prompts: then those of the chunk

    All sequences are at the end of their context and use only blocks 0 and 1, repeatedly. The results are
    meaningless, but take the same memory as real ones.
    """
    needed = -(-context_length // block_tokens)
    ids = [0] * context_length
    chunk = min(max(step_tokens - max_running + 1, 1), context_length)
    scored_chunk = range(context_length - chunk + 1, context_length - 1)
    return [
        Row(
            # The long chunk writes block 0, the others write block 1.
            blocks=[min(index, 1)] * needed,
            start=context_length - (1 if index else chunk),
            stop=context_length,
            ids=ids,
            prompt=context_length - 1,
            sample=True,
            params=params[index % len(params)],
            scored=scored_chunk if scored and not index else UNSCORED,
        )
        for index in range(max_running)
    ]


def largest_steps(
    *, step_tokens: int, max_running: int, context_length: int, block_tokens: int, scored: bool = True
) -> list[list[Row]]:
    """Make steps of which one takes as much memory as any step can.

    The sampler of the CPU has other temporary arrays for rows with a filter, for rows without, and for a
    mixture. The first step also has most tokens; the others, whose sampling may take more, are decodes.
    """
    kinds = ((_PARAMS,), (_UNFILTERED,), (_PARAMS, _UNFILTERED))
    return [
        largest_step(
            step_tokens=0 if index else step_tokens,
            max_running=max_running,
            context_length=context_length,
            block_tokens=block_tokens,
            params=params,
            scored=scored,
        )
        for index, params in enumerate(kinds)
    ]


def measure_blocks(
    target: Target,
    run_largest_steps: Callable[[], None],
    *,
    block_bytes: int,
    block_tokens: int,
    sequence_blocks: int,
    max_running: int,
    requested: int | None,
    mapped: int = 0,
) -> int:
    """Measure the peak memory of steps and the available memory, and choose the number of blocks.

    block_bytes       bytes of one block in all layers
    sequence_blocks   blocks of one sequence with the whole context
    requested         bytes of KV memory by setting; None for a share of the available memory
    mapped            bytes of weights in a mapped file, which count as available although they are needed
    """
    peak = peak_bytes(target.device, run_largest_steps)
    blocks = choose_blocks(
        free=free_bytes(target.device) - mapped,
        # CUDA graphs have their own pool, which takes at most as much as the step with the most rows.
        peak=2 * peak if target.gpu else peak,
        share=_GPU_SHARE if target.gpu else _CPU_SHARE,
        block=block_bytes,
        fewest=sequence_blocks,
        # A GPU's memory has no other use: what running sequences do not need holds cached prefixes.
        most=None if target.gpu else sequence_blocks * max_running,
        requested=requested,
    )
    return min(blocks, _MOST_TOKENS // block_tokens - 1)  # without the spare block of a GPU


def choose_blocks(
    *,
    free: int,
    peak: int,
    share: float,
    block: int,
    fewest: int,
    most: int | None,
    requested: int | None = None,
) -> int:
    """Decide how many blocks KV memory has.

    free        bytes that can be allocated
    peak        peak bytes of a step
    share       of free - peak, for KV memory
    block       bytes of one block in all layers
    fewest      blocks of one sequence with the whole context
    most        blocks of as many such sequences as can run at the same time; None for no limit
    requested   bytes of KV memory by setting; None to take *share*

    Raises LoadingError if not even one sequence fits, or more is requested than is available.
    """
    available = max(free - peak, 0)
    if requested is not None and requested > available:
        raise LoadingError(
            f"{requested / 2**30:.1f} GiB of KV memory were requested, but only {available / 2**30:.1f} GiB "
            "are available besides the model and its steps; request less"
        )
    blocks = (int(available * share) if requested is None else requested) // block
    if blocks < fewest:
        raise LoadingError(
            f"one sequence with the whole context needs {fewest * block / 2**20:.0f} MiB of KV memory, but "
            f"only {blocks * block / 2**20:.0f} MiB are available ({free / 2**20:.0f} MiB are free, of which "
            f"a step takes {peak / 2**20:.0f}); choose a shorter context, or provide more memory"
        )
    return blocks if requested is not None or most is None else min(blocks, most)
