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
        self._first_seconds: float | None = None
        self._token_seconds: float | None = None
        self._tokens: float | None = None

    def note(
        self,
        now: float,
        *,
        first_seconds: float,
        decode_seconds: float,
        tokens: int,
        timed_tokens: int | None = None,
    ) -> None:
        """Book an answer.

        first_seconds    to its first token, queue included
        decode_seconds   from there to its last
        tokens           of the whole answer
        timed_tokens     of these, the ones that the times are about: an answer that resumed brings only those
                         that were missing; None: all
        """
        timed = tokens if timed_tokens is None else min(timed_tokens, tokens)
        if timed < 1:
            return
        self._first_seconds = _mean(self._first_seconds, first_seconds)
        self._tokens = _mean(self._tokens, tokens)
        if timed > 1:
            self._token_seconds = _mean(self._token_seconds, decode_seconds / (timed - 1))
        self._noted = now

    def answer_seconds(self, max_tokens: int | None, now: float) -> float:
        """How long an answer is expected to take, if it is as long as usual and at most *max_tokens*."""
        if self._noted is None:
            return 0.0
        usual = self._tokens or 0.0
        tokens = usual if max_tokens is None else min(usual, max_tokens)
        age: float = 0.5 ** ((now - self._noted) / _HALF_SECONDS)
        return ((self._first_seconds or 0.0) + (self._token_seconds or 0.0) * tokens) * age


def _mean(old: float | None, new: float) -> float:
    return new if old is None else _KEEP * old + (1 - _KEEP) * new
