"""The parameters that chat and text completions share, and the request of the mesh that they become.

The names are those of OpenAI's API, with vLLM's additions where the mesh has the same thing. Types are
checked here, and ranges by `headrace.validation`, as in router and batcher: `params` has the names for its
errors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from headrace.gateway.api.reading import Parameters, Refusal, invalid
from headrace.gateway.api.structured import FormParameters
from headrace.quoting import clipped, quoted
from headrace.v1 import generation_pb2 as pb
from headrace.validation import MAX_BIASES, MAX_STOP_IDS, MAX_STOPS

MAX_CHOICES = 128  # of a request, as in OpenAI's API; each is a request of its own in the mesh
DEFAULT_PRIORITY = 5

_MAX_UINT32 = 2**32 - 1
Uint32 = Annotated[int, Field(ge=0, le=_MAX_UINT32)]

PARAMS: Mapping[str, str] = {
    "sampling": "",  # sampling.top_p is top_p
    "chat": "",
    "chat.template_arguments": "chat_template_kwargs",
    "routing.tier": "model",
    "routing.model": "model",
    "routing.min_tier": "x-headrace-min-tier",
    "routing.max_tier": "x-headrace-max-tier",
    "routing.session_id": "x-headrace-session",
    "routing.tenant": "user",
    "request_id": "request_id",
}


class StreamOptions(Parameters):
    """What a stream of events contains.

    include_usage   whether a last chunk contains the usage of all choices
    """

    ignored: ClassVar[Collection[str]] = ("include_obfuscation", "continuous_usage_stats")

    include_usage: bool | None = None


class CompletionParameters(FormParameters):
    """What chat completions and text completions have in common."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        # vLLM's
        "add_special_tokens": Refusal(
            "prompts are tokenised as the model's tokenizer does by default; leave it out"
        ),
        "allowed_token_ids": Refusal("use logit_bias to prefer or exclude tokens", ([],)),
        "bad_words": Refusal("use logit_bias to exclude tokens", ([],)),
        "cache_salt": Refusal("prefixes are cached per tenant: set user or x-headrace-tenant instead"),
        "length_penalty": Refusal("it applies to beam search only; leave it out", (1, 1.0)),
        "logits_processors": Refusal("leave it out", ([],)),
        "skip_special_tokens": Refusal("special tokens have no text; leave it out", (True,)),
        "truncate_prompt_tokens": Refusal("shorten the prompt before you send it"),
        "use_beam_search": Refusal("leave it out; n returns several sampled answers", (False,)),
    }
    ignored: ClassVar[Collection[str]] = (
        "metadata",
        "service_tier",
        "store",
        # vLLM's
        "kv_transfer_params",
        "spaces_between_special_tokens",
        "vllm_xargs",
    )

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, object], Field(max_length=MAX_BIASES)] | None = None
    max_tokens: Uint32 | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    # vLLM's
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    min_p: float | None = None
    min_tokens: Uint32 | None = None
    priority: int | None = None
    repetition_penalty: float | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stop_token_ids: Annotated[list[Uint32], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_UINT32)] | None = None

    def unused(self, place: str = "") -> list[str]:
        """Return the names of the parameters that are ignored. Raises Problem for one that is refused."""
        names = super().unused(place)
        if self.stream_options is not None:
            names += self.stream_options.unused("stream_options.") if self.stream else ["stream_options"]
        return names

    def params(self) -> Mapping[str, str]:
        """Return the names of parameters by the fields of the contract, for `problem_of`. Raises Problem."""
        if (form := self.form()) is None:
            return PARAMS
        fields = (form.field, "choices.texts", "structured")
        return {**PARAMS, **{f"sampling.{field}": form.name for field in fields}}

    @property
    def choices(self) -> int:
        """How many answers are requested for a prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether the stream ends with a chunk that contains the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def most_tokens(self) -> int | None:
        """Return the most tokens to generate; None: as many as the tier allows."""
        return self.max_tokens

    def sampling(self) -> pb.Sampling:
        """Return how tokens are sampled. Raises Problem for what the mesh cannot represent."""
        sampling = pb.Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None else self.seed % 2**64,
            max_tokens=self.most_tokens(),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            stop_token_ids=self.stop_token_ids,
        )
        for token, bias in (self.logit_bias or {}).items():
            sampling.logit_bias[_token_id(token)] = _bias(token, bias)
        if (form := self.form()) is not None:
            form.set_in(sampling, large=self.large)
        return sampling

    def urgency(self) -> int | None:
        """Return the priority in the mesh: vLLM's grows in the other direction. Raises Problem."""
        if self.priority is None:
            return None
        if not 0 <= (urgency := DEFAULT_PRIORITY - self.priority) <= 9:
            raise invalid(
                "priority",
                f"is {clipped(str(self.priority), 64)}, must be {DEFAULT_PRIORITY - 9} (the most urgent) "
                f"to {DEFAULT_PRIORITY}, 0 by default; x-headrace-priority is 0 to 9, the most urgent",
            )
        return urgency


def _token_id(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _MAX_UINT32:
        return int(text)
    raise invalid("logit_bias", f'has the key {quoted(text)}, must be a token id such as "42"')


def _bias(token: str, value: object) -> float:
    # Checked here, because pydantic would report each of any number of values.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid("logit_bias", f"of token {quoted(token)} must be a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf
