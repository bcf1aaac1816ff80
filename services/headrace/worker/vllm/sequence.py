"""What the runner knows of a sequence at vLLM, and what vLLM's outputs mean for it. Without vLLM itself."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Generic

from headrace.worker.runner import FinishReason, K, SequenceSpec, SequenceTimes, SequenceUpdate
from headrace.worker.vllm.drawing.following import Follower
from headrace.worker.vllm.logprobs import answer_logprobs, prompt_logprobs

NO_TIMES = SequenceTimes()


@dataclass(slots=True, eq=False)
class LiveSequence(Generic[K]):
    """A sequence whose last update is unreported.

    collector    vLLM's RequestOutputCollector, which has the new outputs; None until vLLM has the sequence
    timer        ends it at its deadline
    follower     of a structured answer
    answered     number of answer tokens so far, resumed ones included
    computed     whether its prompt is computed: a token has arrived
    cached       number of submitted ids that the prefix cache held
    statistics   vLLM's RequestStateStats; None before the first output
    ended        whether its last update has been made
    """

    spec: SequenceSpec[K]
    answered: int
    collector: Any = None
    timer: asyncio.TimerHandle | None = None
    follower: Follower | None = None
    computed: bool = False
    cached: int = 0
    statistics: Any = None
    ended: bool = False

    def update(self, output: Any) -> SequenceUpdate[K]:
        """Translate a RequestOutput: new tokens, the end, or both."""
        part = output.outputs[0]
        finish, fault = _finish(part.finish_reason)
        tokens = list(part.token_ids)
        # The token that ended the answer is not part of it.
        end = tokens.pop() if finish is FinishReason.STOP else None
        if self.follower is not None and (problem := self.follower.problem(tokens, end)):
            finish, fault, tokens = FinishReason.INVALID, problem, []
        self.cached, self.statistics = output.num_cached_tokens or 0, output.metrics
        self.computed = self.computed or bool(part.token_ids)
        params = self.spec.params
        logprobs, top = answer_logprobs(part.logprobs, len(tokens), top=params.top_logprobs)
        update = SequenceUpdate(
            self.spec.key,
            self.answered,
            tokens,
            logprobs,
            cached=self.cached,
            finish=finish,
            fault=fault,
            times=NO_TIMES if finish is None else self._times(),
            top=top,
            prompt=prompt_logprobs(output.prompt_logprobs, top=params.prompt_logprobs or 0),
        )
        self.answered += len(tokens)
        if finish is not None:
            self._conclude()
        return update

    def end(self, reason: FinishReason, fault: str = "") -> SequenceUpdate[K]:
        """Make the last update of a sequence that ends for a reason of our own."""
        self._conclude()
        return SequenceUpdate(
            self.spec.key,
            self.answered,
            cached=self.cached,
            finish=reason,
            fault=fault,
            times=self._times(),
        )

    def _conclude(self) -> None:
        self.ended = True
        if self.timer is not None:
            self.timer.cancel()

    def _times(self) -> SequenceTimes:
        """Return the times at vLLM, of the monotonic clock that all processes of a machine share."""
        own = self.statistics
        if own is None:
            return NO_TIMES
        if not self.computed:
            return SequenceTimes(own.scheduled_ts or None)
        return SequenceTimes(own.scheduled_ts or None, own.first_token_ts or None, own.last_token_ts or None)


def _finish(reason: str | None) -> tuple[FinishReason | None, str]:
    """Return our reason for one of vLLM's, and the message of a fault."""
    if reason is None:
        return None, ""
    if reason == "stop":
        return FinishReason.STOP, ""
    if reason == "length":
        return FinishReason.LENGTH, ""
    return FinishReason.FAULT, f"vLLM ended the sequence with {reason!r}; see its log"
