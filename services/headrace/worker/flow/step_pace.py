"""Measure how fast an engine is, from what its steps computed. Plain arithmetic."""

from __future__ import annotations

_WEIGHT = 0.1  # of the newest value in a running mean
# A step counts as at most this many times the mean. After one stall, such as a compilation, the batcher would
# otherwise reject requests, and so prevent the steps that would correct the mean.
_LONGEST = 4.0


class StepPace:
    """Running means over steps.

    step_tokens     most tokens that one step computes
    seconds         mean time of a step; one long step among others counts little
    prompt_tokens   mean number of submitted ids of a sequence, resumed answer included; 0 if unknown
    """

    def __init__(self, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        self.seconds = 0.0
        self.prompt_tokens = 0.0
        self._rate = 0.0  # tokens per second of full steps
        self._decodes = 0  # of the last step

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second that can be computed beside the current decodes; 0 if unknown.

        At least an eighth of the full rate, even if decodes fill the steps: some of them end soon.
        """
        return self._rate * max(1 - self._decodes / self.step_tokens, 0.125)

    def record_submission(self, tokens: int) -> None:
        """Record a submitted sequence with this many ids."""
        self.prompt_tokens += _WEIGHT * (tokens - self.prompt_tokens) if self.prompt_tokens else tokens

    def record_step(self, *, tokens: int, decodes: int, seconds: float) -> None:
        """Record a computed step.

        tokens    number of ids computed, without those that the prefix cache held
        decodes   how many of them continued answers; the others are prompts or resumed answers

        A full step of which at least half is prompt measures how fast prompts are computed. A step at least
        half full of prompt gives a lower bound, at most a factor of two too low. Smaller steps are ignored:
        their time is mostly overhead, and a rate taken from them would reject prompts that can be computed
        in time.
        """
        if self.seconds:
            self.seconds += _WEIGHT * (min(seconds, _LONGEST * self.seconds) - self.seconds)
        else:
            self.seconds = seconds
        self._decodes = decodes
        if 2 * (tokens - decodes) < self.step_tokens or seconds <= 0:
            return
        rate = tokens / seconds
        if tokens >= self.step_tokens:
            self._rate += (_WEIGHT if self._rate else 1.0) * (rate - self._rate)
        else:
            self._rate = max(self._rate, rate)
