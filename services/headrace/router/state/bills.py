"""Count what each tier did, per request and since the start, and what it costs. Plain bookkeeping.

Honest means: tokens of drafts that were given up are on the bill, and so is what was delivered before an
answer broke off. And what the largest tier would have cost is not made dearer than it would have been: it
gets the price of cached tokens for as much of a prompt as any tier found computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from headrace.routing.policy import Price


@dataclass(slots=True)
class Charge:
    """What one tier did; see headrace.v1.Charge."""

    answers: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    wasted_tokens: int = 0

    def add(self, other: Charge) -> None:
        """Add another's counts."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def cost(self, price: Price) -> float:
        """What it comes to; wasted tokens were computed, and cost what delivered ones do."""
        return price.cost(self.prompt_tokens, self.completion_tokens + self.wasted_tokens, self.cached_tokens)


class Bill:
    """What the tiers did for one request, or for all of them.

    tiers    names, smallest first
    prices   of those tiers that have one
    """

    def __init__(self, tiers: Sequence[str], prices: Mapping[str, Price]) -> None:
        self._prices = prices
        self._largest = prices.get(tiers[-1])
        self._charges = {tier: Charge() for tier in tiers}
        # Prompts and answers as the caller saw them, whatever it took to get there.
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._cached_tokens = 0  # of the prompts
        self._found = 0  # of this request's prompt, found computed by drafts

    @property
    def charges(self) -> list[tuple[str, Charge]]:
        """Each tier that did anything and what it did, smallest first."""
        return [(tier, charge) for tier, charge in self._charges.items() if charge.attempts]

    def asked(self, tier: str) -> None:
        """A batcher of the tier was asked for an answer, or for the rest of one."""
        self._charges[tier].attempts += 1

    def wasted(self, tier: str, *, prompt_tokens: int, tokens: int, cached_tokens: int = 0) -> None:
        """The tier took in a prompt and made a draft that was given up."""
        charge = self._charges[tier]
        charge.prompt_tokens += prompt_tokens
        charge.cached_tokens += cached_tokens
        charge.wasted_tokens += tokens
        self._found = max(self._found, cached_tokens)

    def sampled(self, tier: str, *, prompt_tokens: int, tokens: int, cached_tokens: int = 0) -> None:
        """The tier took in a prompt once more and made a sample, which nobody gets.

        Its cached tokens are those that the draft beside it computed, and say nothing of another tier.
        """
        charge = self._charges[tier]
        charge.prompt_tokens += prompt_tokens
        charge.cached_tokens += cached_tokens
        charge.wasted_tokens += tokens

    def answered(
        self, tier: str, *, prompt_tokens: int, tokens: int, wasted_tokens: int = 0, cached_tokens: int = 0
    ) -> None:
        """The tier gave the answer, or as much of it as was delivered."""
        charge = self._charges[tier]
        charge.answers += 1
        charge.prompt_tokens += prompt_tokens
        charge.cached_tokens += cached_tokens
        charge.completion_tokens += tokens
        charge.wasted_tokens += wasted_tokens
        self._prompt_tokens += prompt_tokens
        self._completion_tokens += tokens
        # Another tier's tokenizer may have counted more of them than there are here.
        self._cached_tokens += min(max(self._found, cached_tokens), prompt_tokens)

    def add(self, other: Bill) -> None:
        """Add another bill of the same tiers."""
        for tier, charge in other._charges.items():
            self._charges[tier].add(charge)
        self._prompt_tokens += other._prompt_tokens
        self._completion_tokens += other._completion_tokens
        self._cached_tokens += other._cached_tokens

    def cost_of(self, tier: str) -> float | None:
        """What the tier's charge comes to; None without a price."""
        price = self._prices.get(tier)
        return None if price is None else self._charges[tier].cost(price)

    @property
    def cost(self) -> float | None:
        """All charges together; None where one has no price."""
        costs = [self.cost_of(tier) for tier, _ in self.charges]
        return None if not self._prices or None in costs else sum(cost for cost in costs if cost is not None)

    @property
    def largest_tier_cost(self) -> float | None:
        """What the largest tier would have cost for the same tokens; None without its price."""
        if self._largest is None:
            return None
        return self._largest.cost(self._prompt_tokens, self._completion_tokens, self._cached_tokens)
