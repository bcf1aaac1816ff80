"""What a sequence that we draw the tokens of takes along to vLLM's process: its parameters, as plain values.

They travel in vLLM's `SamplingParams.extra_args`. Without vLLM itself.
"""

from __future__ import annotations

from typing import Any

from headrace.worker.runner import K, SamplingParams, SequenceSpec

KEY = "headrace"

_PLAIN = (
    "seed",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
    "grammar",
)


def packed(spec: SequenceSpec[K]) -> dict[str, Any]:
    """Return the `extra_args` of a sequence."""
    params = spec.params
    plain = {name: getattr(params, name) for name in _PLAIN}
    biases = [[id, float(bias)] for id, bias in params.logit_bias.items()]
    return {KEY: {**plain, "prompt": spec.prompt, "biases": biases, "stop_ids": sorted(params.stop_ids)}}


def unpacked(extra_args: dict[str, Any] | None) -> tuple[SamplingParams, int] | None:
    """Return the parameters and the number of ids that are prompt; None if vLLM draws the tokens itself."""
    values = (extra_args or {}).get(KEY)
    if values is None:
        return None
    params = SamplingParams(
        **{name: values[name] for name in _PLAIN},
        logit_bias={int(id): bias for id, bias in values["biases"]},
        stop_ids=frozenset(values["stop_ids"]),
    )
    return params, values["prompt"]
