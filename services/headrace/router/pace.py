"""Know how fast a tier answers, from the answers it gave. Plain arithmetic; the caller brings the clock.

The policy asks how long an answer would take, to choose a tier that keeps the deadline.
"""

from __future__ import annotations

_KEEP = 0.9  # of the old mean at each answer: about the last ten answers count
_HALF_SECONDS = (
    30.0  # without an answer the estimate halves so often: a tier that was slow gets another chance
)


class Pace:
    """Moving means over one tier's answers. Before the first nothing is known, and takes no time."""

    def __init__(self) -> None:
        self._noted: float | None = None
        self._first_seconds = 0.0
        self._token_seconds = 0.0
        self._tokens = 0.0

    def note(self, now: float, *, first_seconds: float, decode_seconds: float, tokens: int) -> None:
        """Book an answer: seconds to its first token, queue included; from there to its last; its tokens."""
        if tokens < 1:
            return
        per_token = decode_seconds / (tokens - 1) if tokens > 1 else self._token_seconds
        keep = 0.0 if self._noted is None else _KEEP
        self._first_seconds = keep * self._first_seconds + (1 - keep) * first_seconds
        self._token_seconds = keep * self._token_seconds + (1 - keep) * per_token
        self._tokens = keep * self._tokens + (1 - keep) * tokens
        self._noted = now

    def answer_seconds(self, max_tokens: int | None, now: float) -> float:
        """How long an answer is expected to take, if it is as long as usual and at most *max_tokens*."""
        if self._noted is None:
            return 0.0
        tokens = self._tokens if max_tokens is None else min(self._tokens, max_tokens)
        age: float = 0.5 ** ((now - self._noted) / _HALF_SECONDS)
        return (self._first_seconds + self._token_seconds * tokens) * age
