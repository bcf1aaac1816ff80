"""The parameters of text completions, and the requests of the mesh that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from headrace.gateway.api.parameters import MAX_CHOICES, CompletionParameters
from headrace.gateway.api.reading import Refusal, invalid
from headrace.gateway.api.text.prompts import Prompt, Prompts
from headrace.v1 import generation_pb2 as pb

DEFAULT_MAX_TOKENS = 16  # as in OpenAI's API
MAX_LOGPROBS = 20  # of the contract, and of vLLM; OpenAI has 5


class TextParameters(CompletionParameters):
    """The parameters of /v1/completions."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        **CompletionParameters.refused,
        "suffix": Refusal("the models of this server do not insert text; leave it out", ("",)),
        # vLLM's
        "add_special_tokens": Refusal(
            "prompts are tokenized as by /tokenize; send token ids instead", (True,)
        ),
        "prompt_embeds": Refusal("send text or token ids"),
        "prompt_logprobs": Refusal("use echo with logprobs"),
    }

    prompt: Prompts
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def is_text(self) -> bool:
        """Whether the prompts are texts, not token ids."""
        return isinstance(self.prompt[0], str)

    @property
    def echo_only(self) -> bool:
        """Whether the response contains the prompts and no answers."""
        return bool(self.echo) and self.max_tokens == 0

    def params(self) -> Mapping[str, str]:
        """Return the names of parameters by the fields of the contract, for `problem_of`."""
        return {**super().params(), **_PARAMS}

    def most_tokens(self) -> int:
        """Return the most tokens to generate: at least 1, which is left out if `echo_only`."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else max(self.max_tokens, 1)

    def sampling(self) -> pb.Sampling:
        """Return how tokens are sampled. Raises Problem."""
        self._check()
        sampling = super().sampling()
        if self.logprobs is not None:
            sampling.top_logprobs = self.logprobs
            if self.echo:
                sampling.prompt_logprobs = self.logprobs
                if self.most_tokens() == 1 and sampling.WhichOneof("structured") is None:
                    # Evaluation harnesses expect exactly one token after the prompt, and leave it out.
                    # The token that ends a turn counts as one only with ignore_eos.
                    sampling.ignore_eos = True
        return sampling

    def _check(self) -> None:
        if self.best_of is not None and self.best_of != self.choices:
            raise invalid(
                "best_of",
                f"must be equal to n, which is {self.choices}: this server returns all answers "
                "that it generates; set n, and choose the best one",
            )
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens", "must be at least 1, or at least 0 with echo")
        if (total := len(self.prompt) * self.choices) > MAX_CHOICES:
            raise invalid(
                "n",
                f"is {self.choices} for {len(self.prompt)} prompts, which are {total} answers, must be at "
                f"most {MAX_CHOICES}: send several requests",
            )


def requests_of(
    prompts: Sequence[Prompt],
    id: str,
    sampling: pb.Sampling,
    routing: pb.Routing,
    stream: pb.StreamOptions,
) -> list[pb.GenerateRequest]:
    """Return the request for each prompt; with several prompts, their ids are numbered."""
    requests = []
    for place, prompt in enumerate(prompts):
        request = pb.GenerateRequest(
            request_id=id if len(prompts) == 1 else f"{id}-{place}",
            sampling=sampling,
            routing=routing,
            stream=stream,
        )
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.token_ids.ids.extend(prompt)
        requests.append(request)
    return requests


_PARAMS = {
    "prompt": "prompt",
    "token_ids": "prompt",
    "sampling.top_logprobs": "logprobs",
    "sampling.prompt_logprobs": "logprobs",
}
