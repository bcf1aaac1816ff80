"""Translate a sequence's parameters into vLLM's.

vLLM receives prompt and resumed tokens as one prompt, so everything it counts starts after the resumed ones.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from vllm import SamplingParams as VllmParams
from vllm.sampling_params import RequestOutputKind

from headrace.worker.engine.noise import noise_key
from headrace.worker.runner import SamplingParams, SequenceSpec

K = TypeVar("K", bound=Hashable)

GREEDY_BELOW = 1e-5  # temperatures, as in vLLM and in the contract


def sampling_params(spec: SequenceSpec[K], *, eos_ids: frozenset[int], exact: bool) -> VllmParams:
    """Return vLLM's parameters for a sequence.

    eos_ids   ids that end the model's turn
    exact     whether tokens are drawn so that an answer is bit-identical alone, batched or resumed

    The token that ended the answer is the last one in vLLM's output if its finish reason is "stop". The
    caller submits no sequence that has all its tokens already (`spec.resumed` of max_tokens).
    """
    params = spec.params
    endings = {*params.stop_ids, *(() if params.ignore_eos else eos_ids)}
    greedy = params.temperature < GREEDY_BELOW
    return VllmParams(
        seed=None if greedy else _seed(params.seed, spec.resumed),
        temperature=0.0 if greedy else params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        max_tokens=params.max_tokens - spec.resumed,
        min_tokens=max(params.min_tokens - spec.resumed, 0),
        logit_bias=dict(params.logit_bias) or None,
        # The ends of turn are among these: vLLM's own list of them, from the model's files, is not used.
        ignore_eos=True,
        stop_token_ids=sorted(endings),
        logprobs=_logprobs(params),
        prompt_logprobs=None if spec.resumed else params.prompt_logprobs,
        flat_logprobs=True,
        output_kind=RequestOutputKind.DELTA,
        detokenize=False,
        skip_clone=True,
    )


def _logprobs(params: SamplingParams) -> int | None:
    """Return the number of likeliest tokens to report with each token; None for no log-probabilities."""
    return params.top_logprobs if params.logprobs or params.top_logprobs else None


def _seed(seed: int, resumed: int) -> int:
    """Return a seed of 63 bits. A resumed sequence gets other numbers than its first tokens were drawn with."""
    if resumed:
        first, second = noise_key(seed, resumed)
        seed = (first & 0xFFFFFFFF) << 32 | second & 0xFFFFFFFF
    return seed & (2**63 - 1)
