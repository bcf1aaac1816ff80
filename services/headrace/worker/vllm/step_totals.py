"""Add up vLLM's statistics of its steps, as reports need them. Without vLLM itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class StepSize:
    """How much a step computed; see `StepReport`."""

    rows: int = 0
    tokens: int = 0
    decodes: int = 0


NOTHING = StepSize()


@dataclass(slots=True)
class StepTotals:
    """What the steps so far add up to, over all engines of data parallelism.

    cached_tokens, preemptions   since the start
    prefilled                    prompt tokens that steps have computed, of prompts that are not finished:
                                 the runner subtracts those of the others
    """

    cached_tokens: int = 0
    preemptions: int = 0
    prefilled: int = 0
    _running: dict[int, int] = field(default_factory=dict)
    _waiting: dict[int, int] = field(default_factory=dict)
    _usage: dict[int, float] = field(default_factory=dict)

    def add(self, engine: int, scheduler: Any, iteration: Any) -> StepSize:
        """Add the statistics of a step, and return what it computed."""
        if iteration is not None:
            self.cached_tokens += iteration.prompt_token_stats.cached_tokens
            self.preemptions += iteration.num_preempted_reqs
        if scheduler is None:
            return NOTHING
        self._running[engine] = scheduler.num_running_reqs
        self._waiting[engine] = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
        self._usage[engine] = scheduler.kv_cache_usage
        details = scheduler.iteration_details
        if details is None:
            return NOTHING
        self.prefilled += details.num_ctx_tokens
        return StepSize(
            rows=details.num_ctx_requests + details.num_generation_requests,
            tokens=details.num_ctx_tokens + details.num_generation_tokens,
            decodes=details.num_generation_tokens,
        )

    @property
    def running(self) -> int:
        """Sequences that run."""
        return sum(self._running.values())

    @property
    def waiting(self) -> int:
        """Sequences that wait."""
        return sum(self._waiting.values())

    @property
    def kv_usage(self) -> float:
        """Share of KV memory in use, 0 to 1: the mean over the engines."""
        return sum(self._usage.values()) / len(self._usage) if self._usage else 0.0
