"""Translate a sequence's parameters into vLLM's.

vLLM receives prompt and resumed tokens as one prompt, and would count and draw as if the answer began after
them. So `processor` draws the tokens of sequences that vLLM would draw in another way than the contract says:
for those, vLLM is only asked for the likeliest token. It draws the others itself, which takes less time.
"""

from __future__ import annotations

from vllm import SamplingParams as VllmParams
from vllm.sampling_params import RequestOutputKind

from headrace.worker.engine.noise import noise_key
from headrace.worker.runner import K, SamplingParams, SequenceSpec
from headrace.worker.vllm.drawing.handover import packed

GREEDY_BELOW = 1e-5  # temperatures, as in vLLM and in the contract
COOLEST, HOTTEST = 0.01, 2.0  # other temperatures than these vLLM raises or refuses


class Unsupported(ValueError):
    """A sequence needs what this vLLM, as it was started, cannot do; the message says why, for people."""


def sampling_params(
    spec: SequenceSpec[K],
    *,
    eos_ids: frozenset[int],
    exact: bool,
    vocabulary: int | None = None,
    drawing: bool = True,
) -> VllmParams:
    """Return vLLM's parameters for a sequence.

    eos_ids      ids that end the model's turn
    exact        whether sampled tokens depend on nothing but ids, seed and position
    vocabulary   number of the model's logits; None: logit_bias is not checked against it
    drawing      whether vLLM has loaded `processor`

    The token that ended the answer is the last one in vLLM's output if its finish reason is "stop". The
    caller submits no sequence that has all its tokens already (`spec.resumed` of max_tokens).

    Raises Unsupported, and ValueError for a logit_bias of ids outside the vocabulary.
    """
    params = spec.params
    need = _need(spec, exact=exact)
    if need and not drawing:
        if need is not _EXACT:
            raise Unsupported(
                f"{need} needs Headrace's logits processor, which vLLM does not load with these arguments"
            )
        need = ""
    if need:
        if vocabulary is not None and any(not 0 <= id < vocabulary for id in params.logit_bias):
            raise ValueError(f"logit_bias contains a token id that is not below {vocabulary}")
        drawn = {"temperature": 0.0, "extra_args": packed(spec)}
    else:
        drawn = _drawn_by_vllm(spec)
    return VllmParams(
        **drawn,
        max_tokens=params.max_tokens - spec.resumed,
        # The ends of turn are among these: vLLM's own list of them, from the model's files, is not used.
        ignore_eos=True,
        stop_token_ids=sorted({*params.stop_ids, *(() if params.ignore_eos else eos_ids)}),
        logprobs=params.top_logprobs if params.logprobs or params.top_logprobs else None,
        prompt_logprobs=None if spec.resumed else params.prompt_logprobs,
        flat_logprobs=True,
        output_kind=RequestOutputKind.DELTA,
        detokenize=False,
        skip_clone=True,
    )


_EXACT = "an exact answer"


def _need(spec: SequenceSpec[K], *, exact: bool) -> str:
    """Return what a sequence needs that vLLM does not have, in words; empty: nothing."""
    params = spec.params
    greedy = params.temperature < GREEDY_BELOW
    if params.grammar:
        return "a structured answer"
    if not greedy and params.temperature > HOTTEST:
        return f"a temperature above {HOTTEST:g}"
    if spec.resumed and (params.presence_penalty or params.frequency_penalty):
        return "resuming an answer with presence or frequency penalty"
    if exact and (not greedy or _penalised(params)):
        return _EXACT
    return ""


def _penalised(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)


def _drawn_by_vllm(spec: SequenceSpec[K]) -> dict[str, object]:
    """Return the parameters for vLLM's own sampler.

    They mean what the contract says, with these exceptions: min_p comes before top_p, a temperature below
    COOLEST is raised to it, and before min_tokens the end of turn is banned with ignore_eos, too.
    """
    params = spec.params
    greedy = params.temperature < GREEDY_BELOW
    return {
        "seed": None if greedy else _seed(params.seed, spec.resumed),
        "temperature": 0.0 if greedy else max(params.temperature, COOLEST),
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "min_tokens": max(params.min_tokens - spec.resumed, 0),
        "logit_bias": dict(params.logit_bias) or None,
    }


def _seed(seed: int, resumed: int) -> int:
    """Return a seed of 63 bits, another one than the resumed tokens were drawn with."""
    if resumed:
        first, second = noise_key(seed, resumed)
        seed = (first & 0xFFFFFFFF) << 32 | second & 0xFFFFFFFF
    return seed & (2**63 - 1)
