"""A tier as the policy sees it: threshold, health, model, speed and price."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Price:
    """The price of a million tokens, in any currency.

    cached_prompt   for tokens of a prompt that were cached; None: the same as for other prompt tokens
    """

    prompt: float
    completion: float
    cached_prompt: float | None = None

    def cost(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float:
        """Return the cost of these tokens; *cached_tokens* of the prompt's were cached."""
        return self.expected_cost(prompt_tokens, completion_tokens, cached_tokens)

    def expected_cost(self, prompt: float, completion: float, cached: float = 0.0) -> float:
        """Return the cost of expected numbers of tokens; see `cost`."""
        cached_price = self.prompt if self.cached_prompt is None else self.cached_prompt
        return ((prompt - cached) * self.prompt + cached * cached_price + completion * self.completion) / 1e6


@dataclass(frozen=True, slots=True)
class TierView:
    """A tier as the policy sees it.

    threshold       the lowest score that it is meant for; 0 for the first tier
    model           the model that it serves; empty while unknown
    models          all models that it serves; several if it is a router with tiers of its own
    saturated       its queue is full: it would reject a request now
    answer_seconds  the expected time to answer this request, queue included; 0 while unknown
    price           None if no price is configured
    """

    name: str
    threshold: float
    healthy: bool = True
    model: str = ""
    unhealthy_reason: str = ""
    saturated: bool = False
    answer_seconds: float = 0.0
    price: Price | None = None
    models: frozenset[str] = frozenset()

    def serves(self, model: str) -> bool:
        """Whether it answers with *model*."""
        return model in self.models or model == self.model


def even_thresholds(count: int) -> list[float]:
    """Return evenly spaced thresholds for *count* tiers: 0, 1/count, 2/count..."""
    return [place / count for place in range(count)]
