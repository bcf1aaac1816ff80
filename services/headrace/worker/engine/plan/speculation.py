"""Decide how many guessed tokens a decode step verifies: speculative decoding by prompt lookup and grammars.

A row may carry a draft, the tokens that probably come next: those that its grammar leaves no choice about,
and those that followed the same tokens before. The step computes the logits after each of them
and samples there; the tokens up to the first that differs from the draft are those that plain decoding gives
(Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023). The noise of a sampled
token depends on its position only, so nothing is rejected at random, and no bit changes.

A draft pays if the tokens that it probably saves take longer than what it adds to the step. Both are
measured: how often drafts were right after matches of that length, and how long steps take by their tokens.
So there are none where they are mostly wrong, or where a step of many rows takes longer with each token.
Plain arithmetic, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace.worker.engine.plan.lookup import Lookup, Match, draft

# Above, the index takes longer than it saves, and steps are limited by arithmetic.
MOST_ROWS = 8
# Draft tokens of a step. Their logits take memory.
MOST_DRAFTED = 16

_WEIGHT = 0.1  # of the newest value in a running mean
_LONGEST = 4.0  # times the mean: a longer step was interrupted
# What is assumed before it is measured: each further token lengthens a step by this share of its time, as
# sure as measurements that deviate by one token.
_ASSUMED_SLOPE, _ASSUMED_VARIANCE = 0.04, 1.0
# The chance that a token of a draft is right, by the length of the match: up to 4, 8, 15 tokens, or longer.
_CLASSES = (4, 8, 15)
_ASSUMED_CHANCES = (0.4, 0.6, 0.8, 0.9)
# The same of a token that the grammar forces: others could write the same text (measured: none did).
_FORCED_CHANCE = 0.99
_FORGET, _FORGET_UNUSED = 0.95, 0.995  # what is left of the counts after a draft, and after none
_CERTAINTY = 2.0  # how many tokens the assumption counts as
# Less is not certain to be a gain.
_LEAST_GAIN = 1.02


class StepTimes:
    """The time of decode steps as a function of their tokens: a line through the latest ones."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0  # running means
        self._variance = self._covariance = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """Record a step that computed only decodes."""
        if not self._seconds:
            self._tokens, self._seconds = float(tokens), seconds
            return
        beyond = tokens - self._tokens
        more = min(seconds, _LONGEST * self._seconds) - self._seconds
        self._tokens += _WEIGHT * beyond
        self._seconds += _WEIGHT * more
        self._variance = (1 - _WEIGHT) * (self._variance + _WEIGHT * beyond * beyond)
        self._covariance = (1 - _WEIGHT) * (self._covariance + _WEIGHT * beyond * more)

    def estimate(self, tokens: int) -> float:
        """Return the seconds of a step of this many tokens; 0 if no step is known."""
        assumed = _ASSUMED_VARIANCE * _ASSUMED_SLOPE * self._seconds
        slope = max((self._covariance + assumed) / (self._variance + _ASSUMED_VARIANCE), 0.0)
        return max(self._seconds + slope * (tokens - self._tokens), 0.25 * self._seconds)


@dataclass(slots=True)
class Chances:
    """How often the next token of a draft was right, by the length of the match; old drafts count less."""

    _tried: list[float] = field(default_factory=lambda: [0.0] * (len(_CLASSES) + 1))
    _right: list[float] = field(default_factory=lambda: [0.0] * (len(_CLASSES) + 1))

    def of(self, length: int, assumed: float) -> float:
        """Return the chance of each token of a draft, given that those before it are right."""
        own = _class_of(length)
        return (self._right[own] + _CERTAINTY * assumed) / (self._tried[own] + _CERTAINTY)

    def record(self, length: int, drafted: int, accepted: int) -> None:
        """Record that the first *accepted* of *drafted* tokens were right."""
        own = _class_of(length)
        kept = _FORGET if drafted else _FORGET_UNUSED
        self._right[own] = kept * self._right[own] + accepted
        self._tried[own] = kept * self._tried[own] + min(accepted + 1, drafted)


def _class_of(length: int) -> int:
    return sum(length > most for most in _CLASSES)


class SpeculativeSequence:
    """What speculation keeps of one sequence.

    match     of the planned step; None if its draft has no tokens of a match
    forced    how many tokens of the draft come from the grammar, before those of the match
    drafted   tokens of the draft
    """

    __slots__ = ("chances", "drafted", "forced", "lookup", "match")

    def __init__(self) -> None:
        self.lookup = Lookup()
        self.chances = Chances()
        self.match: Match | None = None
        self.forced = self.drafted = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row of the next step that may carry a draft.

    ids      of its sequence
    most     longest draft that is of use
    forced   ids that its grammar probably leaves no choice about, at most *most*
    """

    own: SpeculativeSequence
    ids: Sequence[int]
    most: int
    forced: Sequence[int] = ()


class Speculation:
    """Drafts for the sequences of one engine."""

    def __init__(self) -> None:
        self.times = StepTimes()
        self._chances = Chances()

    def drafts(self, candidates: Sequence[Candidate]) -> list[list[int]]:
        """Return a draft for each of the rows of a step that only decodes, empty where none pays."""
        gains: list[tuple[float, int]] = []
        for index, candidate in enumerate(candidates):
            own, right = candidate.own, 1.0
            own.drafted, own.forced = 0, min(len(candidate.forced), MOST_DRAFTED)
            own.match = match = _agreeing(candidate)
            for _ in range(own.forced):
                right *= _FORCED_CHANCE
                gains.append((right, index))
            if match is None or candidate.most <= own.forced:
                continue
            shared = self._chances.of(match.length, _ASSUMED_CHANCES[_class_of(match.length)])
            chance = own.chances.of(match.length, shared)
            for _ in range(min(candidate.most, MOST_DRAFTED) - own.forced):
                right *= chance
                gains.append((right, index))
        gains.sort(reverse=True)
        counts = [0] * len(candidates)
        for _, index in gains[: paying(gains, len(candidates), self.times.estimate)]:
            counts[index] += 1
        return [self._draft(candidate, tokens) for candidate, tokens in zip(candidates, counts, strict=True)]

    def _draft(self, candidate: Candidate, tokens: int) -> list[int]:
        own = candidate.own
        own.drafted = tokens
        if own.match is None:
            return list(candidate.forced[:tokens])
        if not tokens:
            self._record(own, own.match, 0, 0)
        return draft(candidate.ids, own.match.place, tokens)

    def record(self, own: SpeculativeSequence, accepted: int) -> None:
        """Record how many tokens of a sequence's draft were right."""
        if own.drafted > own.forced and accepted >= own.forced and own.match is not None:
            self._record(own, own.match, own.drafted - own.forced, accepted - own.forced)

    def _record(self, own: SpeculativeSequence, match: Match, drafted: int, accepted: int) -> None:
        for chances in (self._chances, own.chances):
            chances.record(match.length, drafted, accepted)


def _agreeing(candidate: Candidate) -> Match | None:
    """Return the match of a candidate, unless the tokens after it are not those that the grammar forces."""
    match, forced = candidate.own.lookup.find(candidate.ids), candidate.forced
    if match is None or not forced:
        return match
    return match if draft(candidate.ids, match.place, len(forced)) == list(forced) else None


def paying(gains: Sequence[tuple[float, int]], rows: int, estimate: Callable[[int], float]) -> int:
    """Return how many draft tokens to verify, so that a step gives the most tokens per second.

    gains      the chance that each draft token is right, and its row; the likeliest first
    rows       of the step
    estimate   seconds of a step by its tokens
    """
    expected, best, most = float(rows), 0, _LEAST_GAIN * rows / max(estimate(rows), 1e-9)
    for count, (right, _) in enumerate(gains[:MOST_DRAFTED], 1):
        expected += right
        rate = expected / max(estimate(rows + count), 1e-9)
        if rate > most:
            best, most = count, rate
    return best
