"""Choose the tiers whose tokenizer a call means, and pin requests whose token ids belong to one model."""

from __future__ import annotations

from collections.abc import Sequence

from headrace import errors
from headrace.quoting import quoted
from headrace.router.chooser import NO_TIER_RETRY_SECONDS
from headrace.router.state.tiers import Tier
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import tokenizer_service_pb2 as tokenizer_pb


def pin_token_ids(request: pb.GenerateRequest, tiers: Sequence[Tier]) -> None:
    """Set `routing.model` of a request with token ids that names neither tier nor model.

    Raises InvalidRequest if there are several models, and NoWorkers while none is known.
    """
    routing = request.routing
    if request.HasField("token_ids") and not (routing.tier or routing.model):
        routing.model = _only_model(
            tiers, "token_ids are of one model", "routing.tier", "routing.model", field="routing.model"
        )


def tiers_of(choice: tokenizer_pb.TokenizerChoice, tiers: Sequence[Tier]) -> list[Tier]:
    """Return the tiers that have the tokenizer, smallest first; at least one.

    Raises UnknownTier, UnknownModel, InvalidRequest if the choice is not clear, and NoWorkers while it is not
    known which tier serves the model.
    """
    found = list(tiers)
    if choice.tier:
        found = [tier for tier in tiers if tier.name == choice.tier]
        if not found:
            raise errors.UnknownTier(
                f"tokenizer.tier is {quoted(choice.tier)}; the tiers are {_names(tiers)}",
                field="tokenizer.tier",
            )
    if choice.model:
        return _serving(choice.model, found)
    if len(found) > 1:
        _only_model(
            found,
            "each model has its own tokenizer",
            "tokenizer.tier",
            "tokenizer.model",
            field="tokenizer.tier",
        )
    return found


def _serving(model: str, tiers: Sequence[Tier]) -> list[Tier]:
    if found := [tier for tier in tiers if model in tier.models]:
        return found
    if unknown := [tier for tier in tiers if not tier.models]:
        raise errors.NoWorkers(
            f"tokenizer.model is {quoted(model)}, and the model of {_names(unknown)} is not known yet; try "
            "again shortly",
            retry_after=NO_TIER_RETRY_SECONDS,
        )
    raise errors.UnknownModel(
        f"tokenizer.model is {quoted(model)}; the models of {_names(tiers)} are {', '.join(_models(tiers))}",
        field="tokenizer.model",
    )


def _only_model(tiers: Sequence[Tier], why: str, tier_field: str, model_field: str, *, field: str) -> str:
    """Return the model of all *tiers*. Raises InvalidRequest if they have several, NoWorkers if none."""
    models = _models(tiers)
    if not models:
        raise errors.NoWorkers(
            f"no model of the tiers {_names(tiers)} is known yet; try again shortly",
            retry_after=NO_TIER_RETRY_SECONDS,
        )
    if len(models) == 1 and all(tier.models for tier in tiers):
        return models[0]
    raise errors.InvalidRequest(
        f"{why}: set {tier_field} to one of {_names(tiers)}, or {model_field} to one of {', '.join(models)}",
        field=field,
    )


def _names(tiers: Sequence[Tier]) -> str:
    return ", ".join(tier.name for tier in tiers)


def _models(tiers: Sequence[Tier]) -> list[str]:
    return sorted(frozenset().union(*(tier.models for tier in tiers)))
