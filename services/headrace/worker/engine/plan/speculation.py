"""Decide how many guessed tokens a decode step verifies: speculative decoding by prompt lookup and grammars.

A row may carry a draft, the tokens that probably come next: those that its grammar leaves no choice about,
and those that followed the same tokens before, in its own text or in an earlier answer. The step computes the
logits after each of them and samples there; the tokens up to the first that differs from the draft are those
that plain decoding gives (Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023).
The noise of a sampled token depends on its position only, so nothing is rejected at random, and no bit
changes.

A draft pays if the tokens that it probably saves take longer than what it adds to the step. Both are
measured: how often tokens were right after how many that agree, and how long steps take by their tokens.
So there are none where they are mostly wrong, or where a step of many rows takes longer with each token.
Plain arithmetic, no clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace.worker.engine.plan.lookup import Answers, Lookup, Match, draft

# Above, the index takes longer than it saves, and steps are limited by arithmetic.
MOST_ROWS = 8
# Draft tokens of a step. Their logits take memory.
MOST_DRAFTED = 16

_WEIGHT = 0.1  # of the newest value in a running mean
_LONGEST = 4.0  # times the mean: a longer step was interrupted
# What is assumed before it is measured: each further token lengthens a step by this share of its time, as
# sure as measurements that deviate by one token.
_ASSUMED_SLOPE, _ASSUMED_VARIANCE = 0.04, 1.0
# The chance that a token is right, by how many tokens agree before it: 1, up to 4, 8, 15, or more.
_GROUPS = (1, 4, 8, 15)
_ASSUMED_CHANCES = (0.2, 0.5, 0.8, 0.9, 0.9)
# The same of a token that the grammar forces: others could write the same text (measured: none did).
_FORCED_CHANCE = 0.99
_FORGET, _FORGET_UNUSED = 0.98, 0.998  # what is left of the counts after a token, and after none
_CERTAINTY = 4.0  # how many tokens the assumption counts as
# Less is not certain to be a gain.
_LEAST_GAIN = 1.02
_LEAST_CHANCE = 0.02  # a token never pays with less


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
    """How often a token of a draft was right, by how many tokens agree before it; old ones count less.

    These are the tokens of the match and those of the draft before this one: if one is wrong, the rest of the
    draft is of no use.
    """

    _tried: list[float] = field(default_factory=lambda: [0.0] * len(_ASSUMED_CHANCES))
    _right: list[float] = field(default_factory=lambda: [0.0] * len(_ASSUMED_CHANCES))

    def of(self, group: int, assumed: float) -> float:
        """Return the chance of a token of this group."""
        return (self._right[group] + _CERTAINTY * assumed) / (self._tried[group] + _CERTAINTY)

    def record(self, agreeing: int, drafted: int, accepted: int) -> None:
        """Record that the first *accepted* of *drafted* tokens were right, after those that agreed."""
        if not drafted:
            group = _group(agreeing)
            self._right[group] *= _FORGET_UNUSED
            self._tried[group] *= _FORGET_UNUSED
        for index in range(min(accepted + 1, drafted)):
            group = _group(agreeing + index)
            self._right[group] = _FORGET * self._right[group] + (index < accepted)
            self._tried[group] = _FORGET * self._tried[group] + 1


def _group(agreeing: int) -> int:
    return bisect_left(_GROUPS, agreeing)


class SpeculativeSequence:
    """What speculation keeps of one sequence.

    scope     whose answers it may repeat, see `SequenceSpec`
    match     of the planned step; None if its draft has no tokens of a match
    forced    how many tokens of the draft come from the grammar, before those of the match
    drafted   tokens of the draft
    """

    __slots__ = ("chances", "drafted", "forced", "lookup", "match", "scope")

    def __init__(self, scope: bytes = b"") -> None:
        self.scope = scope
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
        self._answers = Answers()
        self._chances = Chances()

    def drafts(self, candidates: Sequence[Candidate]) -> list[list[int]]:
        """Return a draft for each of the rows of a step that only decodes, empty where none pays."""
        gains: list[tuple[float, int]] = []
        drafts: list[list[int]] = []
        for index, candidate in enumerate(candidates):
            own, right = candidate.own, 1.0
            guesses = self._guesses(candidate)
            own.forced = min(len(candidate.forced), len(guesses))
            agreeing = own.match.length if own.match is not None else 0
            for place in range(len(guesses)):
                right *= _FORCED_CHANCE if place < own.forced else self._chance(own, agreeing + place)
                if right < _LEAST_CHANCE:
                    break
                gains.append((right, index))
            drafts.append(guesses)
        gains.sort(reverse=True)
        counts = [0] * len(candidates)
        for _, index in gains[: paying(gains, len(candidates), self.times.estimate)]:
            counts[index] += 1
        for candidate, guesses, tokens in zip(candidates, drafts, counts, strict=True):
            own = candidate.own
            own.drafted = tokens
            if not tokens and own.match is not None:
                self._record(own, own.match, 0, 0)
            del guesses[tokens:]
        return drafts

    def record(self, own: SpeculativeSequence, accepted: int) -> None:
        """Record how many tokens of a sequence's draft were right."""
        if own.drafted > own.forced and accepted >= own.forced and own.match is not None:
            self._record(own, own.match, own.drafted - own.forced, accepted - own.forced)

    def remember(self, scope: bytes, answer: Sequence[int]) -> None:
        """Keep an answer that has ended for the sequences of its scope."""
        self._answers.add(scope, answer)

    def _chance(self, own: SpeculativeSequence, agreeing: int) -> float:
        """Return the chance of a token of a draft, after so many that agree."""
        group = _group(agreeing)
        return own.chances.of(group, self._chances.of(group, _ASSUMED_CHANCES[group]))

    def _record(self, own: SpeculativeSequence, match: Match, drafted: int, accepted: int) -> None:
        for chances in (self._chances, own.chances):
            chances.record(match.length + own.forced, drafted, accepted)

    def _guesses(self, candidate: Candidate) -> list[int]:
        """Return what probably follows the ids of a candidate, and keep its match.

        That is what its grammar forces, and then what followed the longest match that agrees with it.
        """
        own, ids, forced = candidate.own, candidate.ids, list(candidate.forced[:MOST_DRAFTED])
        most = max(min(candidate.most, MOST_DRAFTED), 0)
        own.lookup.add(ids)
        found, own.match = forced, None
        for match in (own.lookup.find(ids, ids), self._answers.find(own.scope, ids)):
            if match is not None and (own.match is None or match.length > own.match.length):
                guesses = draft(match.text, match.place, most)
                if len(guesses) > len(forced) and guesses[: len(forced)] == forced:
                    found, own.match = guesses, match
        return found


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
