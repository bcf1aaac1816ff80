"""Decide which answers are held back as drafts, and which drafts are released. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headrace.routing.drafts.check import Check
from headrace.routing.policy import Decision, shift
from headrace.routing.request import RoutingRequest


@dataclass(frozen=True, slots=True)
class CascadeRules:
    """Which answers are held back as drafts, and which drafts are released.

    enabled         for requests that do not say
    min_score       answers to prompts that score lower are not held back: the prompts are easy
    min_quality     the lowest probability of being good enough at which a draft is released
    draft_tokens    a longer draft is checked as soon as it has this many tokens
    sample_seconds  the longest that a draft waits for a second answer to compare it with; 0: no second answer
    """

    enabled: bool = False
    min_score: float = 0.0
    min_quality: float = 0.4
    draft_tokens: int = 96
    sample_seconds: float = 0.0

    def allow(self, request: RoutingRequest) -> bool:
        """Whether an answer to this request may be held back, as far as the request itself decides."""
        wanted = self.enabled if request.cascade is None else request.cascade
        hints = request.hints
        # With a preference for cost alone every draft would be released.
        return wanted and not (request.resumes or hints.tier or hints.model or hints.quality_preference == 0)

    def hold_back(
        self,
        request: RoutingRequest,
        decision: Decision,
        answer_seconds: Callable[[str], float],
        seconds_left: float,
    ) -> bool:
        """Whether the answer of the chosen tier is held back and checked.

        It is if a larger tier could replace it and the time suffices for both.

        answer_seconds   returns the expected time of an answer of a tier
        """
        if not (self.allow(request) and decision.escalations and request.score >= self.min_score):
            return False
        return answer_seconds(decision.tier) + answer_seconds(decision.escalations[0]) <= seconds_left

    def release(self, check: Check, quality_preference: float) -> bool:
        """Whether a draft is released.

        A preference for quality lowers its probability as it would raise the score of the prompt.
        """
        return shift(check.good, 1 - quality_preference) >= self.min_quality
