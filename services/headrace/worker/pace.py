"""Measure how fast an engine is, from what its steps computed. Plain arithmetic."""

from __future__ import annotations

_WEIGHT = 0.1  # share of the newest value in a running mean


class StepPace:
    """Running means over steps.

    step_tokens       most tokens that one step computes
    seconds           mean time of a step
    prompt_tokens     mean length of what was submitted, prompt and resumed answer; 0 while unknown
    prefill           prompt tokens that full steps compute per second; 0 while unknown
    """

    def __init__(self, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        self.seconds = 0.0
        self.prompt_tokens = 0.0
        self.prefill = 0.0

    def submitted(self, tokens: int) -> None:
        """A sequence of so many ids came."""
        self.prompt_tokens += _WEIGHT * (tokens - self.prompt_tokens) if self.prompt_tokens else tokens

    def stepped(self, *, tokens: int, decodes: int, seconds: float) -> None:
        """A step was computed.

        tokens    ids that it computed; what was found in KV memory is not among them
        decodes   how many of them were the last ids of answers; the others are prompts, or answers resumed

        Full steps say how fast prompts are computed beside the decodes. Steps that prompts fill by half say
        how fast at least, and are off by no more than twice. Smaller ones say nothing: a step takes its time
        for a few tokens as well, and who judged by that would refuse prompts that can be computed in time.
        """
        self.seconds += (_WEIGHT if self.seconds else 1.0) * (seconds - self.seconds)
        prompts = tokens - decodes
        if prompts <= 0 or seconds <= 0:
            return
        rate = prompts / seconds
        if tokens >= self.step_tokens:
            self.prefill += (_WEIGHT if self.prefill else 1.0) * (rate - self.prefill)
        elif 2 * prompts >= self.step_tokens:
            self.prefill = max(self.prefill, rate)
