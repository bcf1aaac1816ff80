"""Record the metrics of a worker's engine, from the reports of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.metrics import catalogue
from headrace.metrics.rare import create_for_worker
from headrace.metrics.words import Outcome
from headrace.worker.runner import FinishReason, ModelInfo, StepReport

_OUTCOMES: dict[FinishReason, Outcome] = {
    FinishReason.STOP: "ok",
    FinishReason.LENGTH: "ok",
    FinishReason.CANCELLED: "cancelled",
    FinishReason.DEADLINE: "deadline",
    FinishReason.FAULT: "failed",
    FinishReason.INVALID: "invalid",
}


class EngineMetrics:
    """The metrics of one engine.

    rate   tokens per second, as measured elsewhere

    tier   that the worker works for
    """

    def __init__(self, model: ModelInfo, tier: str) -> None:
        self._model = model
        self._labels = labels = {"tier": tier, "model": model.name}
        self.rate = catalogue.TOKEN_RATE.of(**labels)
        self._running = catalogue.RUNNING.of(**labels)
        self._waiting = catalogue.WAITING.of(**labels)
        self._kv_usage = catalogue.KV_USAGE.of(**labels)
        self._preempted = catalogue.PREEMPTED.of(**labels)
        self._cached = catalogue.PREFIX_TOKENS.of(**labels, source="cached")
        self._computed = catalogue.PREFIX_TOKENS.of(**labels, source="computed")
        self._accepted = catalogue.SPECULATIVE_TOKENS.of(**labels, source="accepted")
        self._rejected = catalogue.SPECULATIVE_TOKENS.of(**labels, source="rejected")
        self._generated = catalogue.GENERATED_TOKENS.of(**labels)
        self._dropped = catalogue.WASTED_TOKENS.of(tier=tier, cause="over_generation")
        self._rows = catalogue.STEP_ROWS.of(**labels)
        self._fill = catalogue.STEP_FILL.of(**labels)
        self._seconds = catalogue.STEP_DURATION.of(**labels)
        catalogue.KV_CAPACITY.of(**labels).set(model.kv_tokens)
        create_for_worker(tier, model.name)

    def record_end(self, finish: FinishReason) -> None:
        """Record a sequence that ended."""
        outcome = _OUTCOMES[finish]
        name = finish.value if outcome == "ok" else ""
        catalogue.ENDED.of(**self._labels, outcome=outcome, finish=name).add()

    def record(self, reports: Sequence[StepReport[Any]], before: StepReport[Any], tokens: int) -> None:
        """Record *reports*, at least one, which have *tokens* new tokens together.

        before   the report before them
        """
        newest = reports[-1]
        self._kv_usage.set(1 - newest.kv_tokens_free / self._model.kv_tokens)
        self._cached.add(newest.cached_tokens - before.cached_tokens)
        self._preempted.add(newest.preemptions - before.preemptions)
        self._running.set(newest.running)
        self._waiting.set(newest.waiting)
        self._generated.add(tokens)
        for report in reports:
            if report.rows:
                self._rows.record(report.rows)
                self._fill.record(report.rows / self._model.max_running)
                self._seconds.record(report.seconds)
                self._computed.add(report.tokens - report.decodes)
                self._dropped.add(report.dropped)
                if report.drafted:
                    self._accepted.add(report.accepted)
                    self._rejected.add(report.drafted - report.accepted)
