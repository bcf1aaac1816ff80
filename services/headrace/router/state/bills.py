"""Count the work of each tier and its cost, for one request or for all requests since the start.

Tokens of discarded drafts are on the bill, and so are tokens that were delivered before an answer failed. The
cost on the largest tier is not overstated: it uses the price of cached tokens for as many prompt tokens as
were cached on any tier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.routing.tier_view import Price


@dataclass(slots=True)
class Charge:
    """The work of one tier; see headrace.v1.Charge."""

    answers: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    wasted_tokens: int = 0

    def add(self, other: Charge) -> None:
        """Add the counts of *other*."""
        self.answers += other.answers
        self.attempts += other.attempts
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.wasted_tokens += other.wasted_tokens

    def cost(self, price: Price) -> float:
        """Return the cost. Wasted tokens were computed, so they cost as much as delivered ones."""
        return price.cost(self.prompt_tokens, self.completion_tokens + self.wasted_tokens, self.cached_tokens)


class Bill:
    """The work of all tiers for one request, or for all requests.

    tiers    names, smallest first
    prices   of the tiers that have one
    """

    def __init__(self, tiers: Sequence[str], prices: Mapping[str, Price]) -> None:
        self._prices = prices
        self._largest = prices.get(tiers[-1])
        self._charges = {tier: Charge() for tier in tiers}
        # Prompts and answers as callers see them, without drafts, samples and repeated work.
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._cached_tokens = 0  # of the prompts
        self._cached_by_drafts = 0  # of this request's prompt

    @property
    def charges(self) -> list[tuple[str, Charge]]:
        """Return each tier that was used and its charge, smallest first."""
        return [(tier, charge) for tier, charge in self._charges.items() if charge.attempts]

    def add_attempt(self, tier: str) -> None:
        """Add a request to a batcher of the tier, for an answer or for the rest of one."""
        self._charges[tier].attempts += 1

    def add_draft(self, tier: str, *, prompt_tokens: int, tokens: int, cached_tokens: int = 0) -> None:
        """Add a draft that was discarded."""
        self.add_sample(tier, prompt_tokens=prompt_tokens, tokens=tokens, cached_tokens=cached_tokens)
        self._cached_by_drafts = max(self._cached_by_drafts, cached_tokens)

    def add_sample(self, tier: str, *, prompt_tokens: int, tokens: int, cached_tokens: int = 0) -> None:
        """Add a second answer, which only served to check a draft.

        Its cached tokens were computed by the draft beside it, so they do not count for other tiers.
        """
        charge = self._charges[tier]
        charge.prompt_tokens += prompt_tokens
        charge.cached_tokens += cached_tokens
        charge.wasted_tokens += tokens

    def add_answer(
        self, tier: str, *, prompt_tokens: int, tokens: int, wasted_tokens: int = 0, cached_tokens: int = 0
    ) -> None:
        """Add an answer, or the part of it that was delivered."""
        charge = self._charges[tier]
        charge.answers += 1
        charge.prompt_tokens += prompt_tokens
        charge.cached_tokens += cached_tokens
        charge.completion_tokens += tokens
        charge.wasted_tokens += wasted_tokens
        self._prompt_tokens += prompt_tokens
        self._completion_tokens += tokens
        # The tokenizer of a draft's tier may have counted more tokens than this prompt has here.
        self._cached_tokens += min(max(self._cached_by_drafts, cached_tokens), prompt_tokens)

    def add(self, other: Bill) -> None:
        """Add another bill of the same tiers."""
        for tier, charge in other._charges.items():
            self._charges[tier].add(charge)
        self._prompt_tokens += other._prompt_tokens
        self._completion_tokens += other._completion_tokens
        self._cached_tokens += other._cached_tokens

    def cost_of(self, tier: str) -> float | None:
        """Return the cost of the tier's charge; None without a price."""
        price = self._prices.get(tier)
        return None if price is None else self._charges[tier].cost(price)

    @property
    def answer_tokens(self) -> int:
        """Tokens of prompts and answers as callers see them."""
        return self._prompt_tokens + self._completion_tokens

    @property
    def known_cost(self) -> float:
        """The cost of the tiers that have a price."""
        return sum(self.cost_of(tier) or 0.0 for tier, _ in self.charges)

    @property
    def cost(self) -> float | None:
        """The cost of all charges; None if a tier has no price."""
        costs = [self.cost_of(tier) for tier, _ in self.charges]
        return None if not self._prices or None in costs else sum(cost for cost in costs if cost is not None)

    @property
    def largest_tier_cost(self) -> float | None:
        """The cost of the same tokens on the largest tier; None without its price."""

        if self._largest is None:
            return None
        return self._largest.cost(self._prompt_tokens, self._completion_tokens, self._cached_tokens)
