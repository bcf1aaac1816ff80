"""Say what a request must fit, as the tier's workers are now: plain checks of plain values.

What can be judged without a model is `headrace.validation`'s. Each check raises the InvalidRequest that says
what to mend.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire

# Below this the likeliest token is always drawn, as vLLM has it: such a temperature is meant as 0, and the
# quotients would leave float32.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class Limits:
    """What one tier takes.

    model            what it serves, by name
    context_length   most tokens of prompt and answer together
    vocabulary       token ids are below this
    max_tokens       most tokens of an answer
    """

    tier: str
    model: str
    context_length: int
    vocabulary: int
    max_tokens: int

    @classmethod
    def of(cls, tier: str, models: Iterable[wire.ModelDescription], max_tokens: int) -> Limits:
        """What every worker of the tier takes; *models* are theirs, at least one."""
        models = list(models)
        return cls(
            tier,
            models[0].name,
            min(model.context_length for model in models),
            min(model.vocabulary_size for model in models),
            max_tokens,
        )

    def check(self, request: pb.GenerateRequest) -> None:
        """Check all but the prompt: pins, ids, and what is to be resumed."""
        hints = request.routing
        if hints.tier and hints.tier != self.tier:
            raise errors.UnknownTier(
                f"this batcher serves tier {self.tier!r}, not {errors.quoted(hints.tier)}",
                field="routing.tier",
            )
        if hints.model and hints.model != self.model:
            raise errors.UnknownModel(
                f"tier {self.tier!r} serves {self.model!r}, not {errors.quoted(hints.model)}",
                field="routing.model",
            )
        self.check_resume(1, len(request.resume.token_ids))
        given: dict[str, Iterable[int]] = {
            "sampling.logit_bias": request.sampling.logit_bias,
            "sampling.stop_token_ids": request.sampling.stop_token_ids,
            "resume.token_ids": request.resume.token_ids,
        }
        for field, tokens in given.items():
            if (token := max(tokens, default=0)) >= self.vocabulary:
                raise errors.InvalidSampling(
                    f"token id {token} is not in the model's vocabulary of {self.vocabulary}", field=field
                )

    def check_fewest(self, tokens: int) -> None:
        """Check a prompt that has at least so many tokens: nothing else of it is known yet."""
        if tokens >= self.context_length:
            raise errors.ContextTooLong(
                f"the prompt has at least {tokens} tokens, tier {self.tier!r} takes {self.context_length} "
                "for prompt and answer: shorten it, or use a tier with a longer context",
                field="input",
                prompt_tokens_at_least=tokens,
                context_length=self.context_length,
            )

    def check_prompt(self, tokens: int) -> None:
        """Check a prompt of so many tokens."""
        if not tokens:
            raise errors.EmptyInput("the prompt has no tokens: give it text", field="input")
        if tokens >= self.context_length:
            raise errors.ContextTooLong(
                f"the prompt has {tokens} tokens, tier {self.tier!r} takes {self.context_length} for "
                "prompt and answer: shorten it, or use a tier with a longer context",
                field="input",
                prompt_tokens=tokens,
                context_length=self.context_length,
            )

    def check_resume(self, prompt_tokens: int, tokens: int) -> None:
        """Check an answer of so many tokens that is to be carried on."""
        if prompt_tokens + tokens > self.context_length:
            raise errors.ContextTooLong(
                f"resume.token_ids has {tokens} tokens and the prompt at least {prompt_tokens}, tier "
                f"{self.tier!r} takes {self.context_length} for both: resume with what this tier answered",
                field="resume.token_ids",
                prompt_tokens=prompt_tokens,
                context_length=self.context_length,
            )

    def sampling(self, asked: pb.Sampling, prompt_tokens: int, defaults: pb.Sampling) -> pb.Sampling:
        """What is asked for, with all that workers need: the seed drawn, and max_tokens as there is room.

        defaults   fields that are not asked for have these values
        """
        sampling = pb.Sampling()
        sampling.CopyFrom(defaults)
        sampling.MergeFrom(asked)
        wanted = sampling.max_tokens if sampling.HasField("max_tokens") else self.max_tokens
        sampling.max_tokens = min(wanted, self.max_tokens, self.context_length - prompt_tokens)
        if sampling.HasField("temperature") and sampling.temperature < GREEDY_BELOW:
            sampling.temperature = 0.0
        if not sampling.HasField("seed"):
            sampling.seed = secrets.randbits(64)
        return sampling
