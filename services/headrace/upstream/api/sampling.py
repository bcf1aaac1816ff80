"""Translate how tokens are sampled to the parameters of an upstream."""

from __future__ import annotations

from typing import Any

from headrace.upstream.api.terms import Api, Terms, lacks, unsupported
from headrace.v1 import generation_pb2 as pb

MAX_STOPS = 4  # of OpenAI's API, and of vLLM by default
MAX_TEMPERATURE = 2.0  # of OpenAI's API, and of vLLM
MAX_TEXT_LOGPROBS = 5  # of OpenAI's text completions

# The largest seed, by the type that holds it: int64, and uint32 in llama.cpp, where its largest value stands
# for a random seed.
_SEEDS: dict[Api, int] = {"openai": 2**63, "vllm": 2**63, "llama.cpp": 2**32 - 1}
# Fields that OpenAI's API does not have, with the value that has no effect.
_NO_EFFECT: dict[str, object] = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "ignore_eos": False,
}
# Their names, where a server knows them.
_NAMES: dict[Api, dict[str, str]] = {
    "openai": {},
    "vllm": {name: name for name in _NO_EFFECT},
    "llama.cpp": {
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repeat_penalty",
        "ignore_eos": "ignore_eos",
    },
}
# What a request leaves out is sent to servers that have other defaults than the contract: vLLM has those of
# the model's generation_config.json, and llama.cpp a temperature of 0.8, for example.
_DEFAULTS: dict[Api, tuple[str, ...]] = {
    "openai": (),
    "vllm": ("top_k", "min_p", "repetition_penalty"),
    "llama.cpp": ("top_k", "min_p", "repetition_penalty"),
}
_ALL_TOKENS = {"vllm": -1, "llama.cpp": 0}  # the top_k that keeps all; 0 is not known to SGLang
# llama.cpp penalises tokens among the last 64 only, unless it is set. It allocates so many.
_LAST_TOKENS = 131_072


def sampling_body(sampling: pb.Sampling, terms: Terms, *, chat: bool) -> dict[str, Any]:
    """Return the parameters, without those of the answer's form and its length.

    chat   whether they are for a conversation

    Raises InvalidSampling for what the upstream does not support.
    """
    api = terms.api
    body: dict[str, Any] = {}
    _set_common(body, sampling, api)
    for field, neutral in _NO_EFFECT.items():
        value = _plain(getattr(sampling, field)) if sampling.HasField(field) else neutral  # type: ignore[arg-type]
        if value == neutral and field not in _DEFAULTS[api]:
            continue
        if (name := _NAMES[api].get(field)) is None:
            raise unsupported(f"sampling.{field}")
        body[name] = value
    if body.get("top_k") == 0:
        body["top_k"] = _ALL_TOKENS[api]
    if sampling.stop_token_ids:
        if api != "vllm":
            raise unsupported("sampling.stop_token_ids")
        body["stop_token_ids"] = list(sampling.stop_token_ids)
    penalties = (sampling.repetition_penalty not in (0.0, 1.0), sampling.presence_penalty)
    if api == "llama.cpp" and any((*penalties, sampling.frequency_penalty)):
        body["repeat_last_n"] = _LAST_TOKENS
    if sampling.HasField("prompt_logprobs"):  # vLLM has them only without streaming
        raise unsupported("sampling.prompt_logprobs")
    _set_logprobs(body, sampling, api, chat=chat)
    return body


def _set_common(body: dict[str, Any], sampling: pb.Sampling, api: Api) -> None:
    """Set what is in OpenAI's API."""
    for field in ("temperature", "top_p"):
        if sampling.HasField(field):
            body[field] = _plain(getattr(sampling, field))
        elif api != "openai":
            body[field] = 1.0
        # OpenAI's default is 1, and its reasoning models reject the parameters even with that value.
    if api != "llama.cpp" and body.get("temperature", 0.0) > MAX_TEMPERATURE:
        raise lacks(
            "sampling.temperature",
            f"is {body['temperature']:g}, but the service behind this tier takes at most {MAX_TEMPERATURE:g}",
        )
    for field in ("presence_penalty", "frequency_penalty"):
        if value := getattr(sampling, field):
            body[field] = _plain(value)
    if sampling.HasField("seed"):
        body["seed"] = sampling.seed % _SEEDS[api]
    if sampling.stop:
        if api != "llama.cpp" and len(sampling.stop) > MAX_STOPS:
            raise lacks(
                "sampling.stop",
                f"has {len(sampling.stop)} texts, but the service behind this tier takes at most {MAX_STOPS}",
            )
        body["stop"] = list(sampling.stop)
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): _plain(sampling.logit_bias[token]) for token in sampling.logit_bias}


def _set_logprobs(body: dict[str, Any], sampling: pb.Sampling, api: Api, *, chat: bool) -> None:
    if not (sampling.logprobs or sampling.HasField("top_logprobs")):
        return
    top = sampling.top_logprobs
    if api == "llama.cpp":
        top = max(top, 1)  # none, not even those of the tokens themselves, for 0
    if chat:
        body["logprobs"] = True
        body["top_logprobs"] = top
        return
    if api == "openai" and top > MAX_TEXT_LOGPROBS:
        raise lacks(
            "sampling.top_logprobs",
            f"is {top}, but the service behind this tier returns at most {MAX_TEXT_LOGPROBS} for a prompt",
        )
    body["logprobs"] = top


def _plain(value: float) -> float:
    """Return the shortest decimal number of a float32: 0.7 instead of 0.699999988079071."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
