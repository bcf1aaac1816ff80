"""Expect the tokens of an answer from a tier's recent answers."""

from __future__ import annotations

from headrace.routing.tier_view import Price

_KEEP = 0.98  # weight of the old mean at each answer: about the last fifty answers count
_FIRST_BYTES_PER_TOKEN = 4.0  # before the first answer: usual for English
_FIRST_PROMPT_TOKENS, FIRST_TOKENS = 200.0, 200.0


class TierUsage:
    """Moving averages over the finished answers of one tier.

    prompt_tokens, tokens   of prompt and answer
    """

    def __init__(self) -> None:
        self.prompt_tokens = _FIRST_PROMPT_TOKENS
        self.tokens = FIRST_TOKENS
        self._bytes_per_token = _FIRST_BYTES_PER_TOKEN
        # Cached share of prompts: of conversations whose previous turn the tier has answered, and of others.
        self._cached = {True: 0.0, False: 0.0}
        self._answers = {True: 0, False: 0}

    def record(
        self, *, prompt_bytes: int, prompt_tokens: int, cached_tokens: int, tokens: int, follows: bool
    ) -> None:
        """Record a finished answer.

        prompt_bytes   size of the request, of which the prompt is nearly all
        follows        whether the tier has answered the previous turn of the conversation
        """
        if not (prompt_tokens and prompt_bytes):
            return
        self._answers[follows] += 1
        keep = _keep(sum(self._answers.values()))
        self.prompt_tokens = keep * self.prompt_tokens + (1 - keep) * prompt_tokens
        self.tokens = keep * self.tokens + (1 - keep) * tokens
        self._bytes_per_token = keep * self._bytes_per_token + (1 - keep) * prompt_bytes / prompt_tokens
        share = min(cached_tokens / prompt_tokens, 1.0)
        keep = _keep(self._answers[follows])
        self._cached[follows] = keep * self._cached[follows] + (1 - keep) * share

    def cost(
        self,
        price: Price,
        *,
        prompt_bytes: int,
        tokens: float | None = None,
        max_tokens: int | None = None,
        follows: bool = False,
    ) -> float:
        """Return the expected cost of an answer.

        tokens       its expected length; None: the recent mean
        max_tokens   the most that it may have; None if there is no limit
        """
        expected = self.tokens if tokens is None else tokens
        if max_tokens is not None:
            expected = min(expected, max_tokens)
        prompt = prompt_bytes / self._bytes_per_token
        return price.expected_cost(prompt, expected, prompt * self._cached[follows])

    def typical_cost(self, price: Price) -> float:
        """Return the cost of an answer of the recent mean length to a prompt of the recent mean length."""
        return price.expected_cost(self.prompt_tokens, self.tokens)


def _keep(answers: int) -> float:
    """Return the weight of the old mean at the answer of this number. The first ones count more, so that the
    assumed values are soon forgotten.
    """
    return min(_KEEP, 1 - 1 / (answers + 1))
