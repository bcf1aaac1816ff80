"""Check a request against the limits of its tier's current workers, and complete its sampling fields.

`headrace.validation` checks what needs no model. Each check here raises an InvalidRequest that names the
correction.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from headrace import errors
from headrace.batcher.intake.grammars import grammar_field
from headrace.batcher.token_details import needed_features
from headrace.quoting import quoted
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import worker_service_pb2 as wire

# A lower temperature is taken as 0, as in vLLM: the most likely token is always drawn, and the scaled logits
# would exceed float32.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits of one tier.

    model            the name of the model it serves
    context_length   most tokens of prompt and answer together
    vocabulary       token ids are below this
    max_tokens       most tokens of an answer
    features         optional features of engines that all workers have
    """

    tier: str
    model: str
    context_length: int
    vocabulary: int
    max_tokens: int
    features: frozenset[str] = frozenset()

    @classmethod
    def of(cls, tier: str, models: Iterable[wire.ModelDescription], max_tokens: int) -> RequestLimits:
        """Return the limits that every worker of the tier accepts; *models* are theirs, at least one."""
        models = list(models)
        return cls(
            tier,
            models[0].name,
            min(model.context_length for model in models),
            min(model.vocabulary_size for model in models),
            max_tokens,
            frozenset.intersection(*(frozenset(model.features) for model in models)),
        )

    def check(self, request: pb.GenerateRequest) -> None:
        """Check everything but the prompt: tier, model, features, token ids, and the answer to resume."""
        self.check_names(request.routing.tier, request.routing.model)
        resume_ids, sampling = request.resume.token_ids, request.sampling
        self.check_resume(1, len(resume_ids))
        self._check_ids("sampling.logit_bias", sampling.logit_bias)
        self._check_ids("sampling.stop_token_ids", sampling.stop_token_ids)
        self._check_ids("resume.token_ids", resume_ids)
        for feature, field in needed_features(sampling, grammar_field(request)).items():
            if feature not in self.features:
                raise errors.InvalidSampling(
                    f"{field} is set, but not all workers of tier {self.tier!r} support {feature}: leave it "
                    "out, or use a tier whose engine supports it",
                    field=field,
                    feature=feature,  # see `errors.FEATURE`
                )

    def check_names(self, tier: str, model: str, *, within: str = "routing") -> None:
        """Check the names of a tier and a model, of which each may be empty.

        within   the field of the request that contains them
        """
        if tier and tier != self.tier:
            raise errors.UnknownTier(
                f"this batcher serves tier {self.tier!r}, not {quoted(tier)}", field=f"{within}.tier"
            )
        if model and model != self.model:
            raise errors.UnknownModel(
                f"tier {self.tier!r} serves {self.model!r}, not {quoted(model)}", field=f"{within}.model"
            )

    def _check_ids(self, field: str, tokens: Collection[int]) -> None:
        if tokens and (token := max(tokens)) >= self.vocabulary:
            raise errors.InvalidSampling(
                f"token id {token} is not in the model's vocabulary of {self.vocabulary}", field=field
            )

    def check_ids(self, field: str, ids: Sequence[int]) -> None:
        """Check that the model has the tokens *ids* of an input, at least one."""
        if (token := max(ids)) >= self.vocabulary:
            raise errors.InvalidRequest(
                f"{field} has {token}, but the vocabulary of {self.model!r} has {self.vocabulary} tokens: "
                "send ids of this model, as its tokenizer returns them",
                field=field,
            )

    def check_min_prompt(self, tokens: int) -> None:
        """Check a prompt that is only known to have at least *tokens* tokens."""
        if tokens >= self.context_length:
            raise errors.ContextTooLong(
                f"the prompt has at least {tokens} tokens, but tier {self.tier!r} "
                f"accepts {self.context_length} for prompt and answer: shorten it, or use a tier with a "
                "longer context",
                field="input",
                prompt_tokens_at_least=tokens,
                context_length=self.context_length,
            )

    def check_prompt(self, tokens: int) -> None:
        """Check a prompt of *tokens* tokens."""
        if not tokens:
            raise errors.EmptyInput("the prompt has no tokens: send some text", field="input")
        if tokens >= self.context_length:
            raise errors.ContextTooLong(
                f"the prompt has {tokens} tokens, but tier {self.tier!r} accepts {self.context_length} for "
                "prompt and answer: shorten it, or use a tier with a longer context",
                field="input",
                prompt_tokens=tokens,
                context_length=self.context_length,
            )

    def check_resume(self, prompt_tokens: int, tokens: int) -> None:
        """Check an answer of *tokens* tokens that is to be resumed."""
        if prompt_tokens + tokens > self.context_length:
            raise errors.ContextTooLong(
                f"resume.token_ids has {tokens} tokens and the prompt at least {prompt_tokens}, but tier "
                f"{self.tier!r} accepts {self.context_length} for both: resume with this tier's answer",
                field="resume.token_ids",
                prompt_tokens=prompt_tokens,
                context_length=self.context_length,
            )

    def sampling(self, asked: pb.Sampling, prompt_tokens: int, defaults: pb.Sampling) -> pb.Sampling:
        """Return the complete sampling fields for workers: with a seed, and max_tokens within the context.

        asked      the fields of the request
        defaults   the values of fields that the request leaves out
        """
        sampling = pb.Sampling()
        sampling.CopyFrom(defaults)
        sampling.MergeFrom(asked)
        sampling.ClearField("structured")  # the grammar of the job's form has it
        max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else self.max_tokens
        sampling.max_tokens = min(max_tokens, self.max_tokens, self.context_length - prompt_tokens)
        if sampling.HasField("temperature") and sampling.temperature < GREEDY_BELOW:
            sampling.temperature = 0.0
        if sampling.HasField("top_logprobs"):
            sampling.logprobs = True
        if not sampling.HasField("seed"):
            sampling.seed = secrets.randbits(64)
        return sampling
