"""Measure how fast an engine is, from what its steps computed. Plain arithmetic."""

from __future__ import annotations

_WEIGHT = 0.1  # share of the newest value in a running mean


class StepPace:
    """Running means over steps.

    step_tokens       most tokens that one step computes
    seconds           mean time of a step
    prompt_tokens     mean length of what was submitted, prompt and resumed answer; 0 while unknown
    """

    def __init__(self, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        self.seconds = 0.0
        self.prompt_tokens = 0.0
        self._rate = 0.0  # tokens per second of full steps
        self._decodes = 0  # of the last step

    @property
    def prefill(self) -> float:
        """Prompt tokens that can be computed per second beside the decodes of now; 0 while unknown.

        Steps full of decodes leave no room for prompts, yet soon some of them end: an eighth always counts.
        """
        return self._rate * max(1 - self._decodes / self.step_tokens, 0.125)

    def submitted(self, tokens: int) -> None:
        """A sequence of so many ids came."""
        self.prompt_tokens += _WEIGHT * (tokens - self.prompt_tokens) if self.prompt_tokens else tokens

    def stepped(self, *, tokens: int, decodes: int, seconds: float) -> None:
        """A step was computed.

        tokens    ids that it computed; what was found in KV memory is not among them
        decodes   how many of them were the last ids of answers; the others are prompts, or answers resumed

        Full steps, at least half of them prompts, say how fast prompts are computed. Others that prompts fill
        by half say how fast at least, and are off by no more than twice. Smaller ones say nothing: a step
        takes its time for a few tokens as well, and who judged by that would refuse prompts that can be
        computed in time.
        """
        self.seconds += (_WEIGHT if self.seconds else 1.0) * (seconds - self.seconds)
        self._decodes = decodes
        if 2 * (tokens - decodes) < self.step_tokens or seconds <= 0:
            return
        rate = tokens / seconds
        if tokens >= self.step_tokens:
            self._rate += (_WEIGHT if self._rate else 1.0) * (rate - self._rate)
        else:
            self._rate = max(self._rate, rate)
