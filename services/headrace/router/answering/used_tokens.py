"""Count the tokens of one stream for its bill.

A batcher reports the tokens of the prompt when it accepts a request, and each delta has a number of tokens. A
service outside of the mesh reports both at the end of its answer, which is text alone. If it reports none, or
its stream ends early, the tokens are estimated: those of the answer by its deltas, and those of the prompt by
its characters. Otherwise nobody would pay for the prompt of a caller that leaves before the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from headrace.router.answering.prompts import estimated_tokens
from headrace.v1 import generation_pb2 as pb


@dataclass(slots=True)
class UsedTokens:
    """What one stream has used so far.

    prompt      tokens of the prompt; 0 while a service outside has not reported them
    completion  tokens that were generated
    text_only   as in `headrace.v1.Accepted`
    """

    prompt: int = 0
    completion: int = 0
    text_only: bool = False

    def accept(self, accepted: pb.Accepted) -> None:
        """Take the first event."""
        self.prompt, self.text_only = accepted.prompt_tokens, accepted.text_only

    def finish(self, usage: pb.Usage) -> None:
        """Take the usage of the last event."""
        self.prompt = usage.prompt_tokens or self.prompt
        if self.text_only:
            self.completion = usage.completion_tokens

    def prompt_of(self, request: pb.GenerateRequest) -> int:
        """Return the tokens of the prompt to bill: those that were reported, or else an estimate."""
        if self.prompt or not self.text_only:
            return self.prompt
        return ceil(estimated_tokens(request))
