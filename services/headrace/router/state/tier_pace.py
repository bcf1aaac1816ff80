"""Estimate how long a tier takes for an answer, from its recent answers. The caller passes the time.

The policy uses the estimate to choose a tier that meets the deadline.
"""

from __future__ import annotations

_KEEP = 0.9  # weight of the old mean at each answer: about the last ten answers count
# Without answers the estimate halves in this time, so that a tier that was slow is tried again.
_HALF_LIFE_SECONDS = 30.0


class TierPace:
    """Moving averages over the answers of one tier. Before the first answer the estimate is 0."""

    def __init__(self) -> None:
        self._recorded: float | None = None
        self._first_seconds: float | None = None
        self._token_seconds: float | None = None
        self._tokens: float | None = None

    def record(
        self,
        now: float,
        *,
        first_seconds: float,
        decode_seconds: float,
        tokens: int,
        timed_tokens: int | None = None,
    ) -> None:
        """Record an answer.

        first_seconds    until its first token, queue included
        decode_seconds   from its first to its last token
        tokens           of the whole answer
        timed_tokens     the tokens that the times cover: a resumed answer has only its new tokens; None: all
        """
        timed = tokens if timed_tokens is None else min(timed_tokens, tokens)
        if timed < 1:
            return
        self._first_seconds = _mean(self._first_seconds, first_seconds)
        self._tokens = _mean(self._tokens, tokens)
        if timed > 1:
            self._token_seconds = _mean(self._token_seconds, decode_seconds / (timed - 1))
        self._recorded = now

    def answer_seconds(self, max_tokens: int | None, now: float) -> float:
        """Return the expected time of an answer of the usual length, at most *max_tokens*."""
        if self._recorded is None:
            return 0.0
        usual = self._tokens or 0.0
        tokens = usual if max_tokens is None else min(usual, max_tokens)
        age: float = 0.5 ** ((now - self._recorded) / _HALF_LIFE_SECONDS)
        return ((self._first_seconds or 0.0) + (self._token_seconds or 0.0) * tokens) * age


def _mean(old: float | None, new: float) -> float:
    return new if old is None else _KEEP * old + (1 - _KEEP) * new
