"""Receive vLLM's statistics after each of its steps.

vLLM's output handler puts the new tokens of all sequences of a step into their collectors, in one or several
chunks, and then calls its statistics loggers, once per step. So a logger is the place where a whole step can
be reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger

# Receives the number of the engine, its SchedulerStats and IterationStats; either can be None.
Listener = Callable[[int, Any, Any], None]


def step_logger(listener: Listener) -> type[PrometheusStatLogger]:
    """Return a class of statistics loggers that calls *listener* after each step.

    It takes the place of vLLM's logger for Prometheus, which would add a histogram's observation per token,
    for a registry that the worker does not serve.
    """

    class StepLogger(PrometheusStatLogger):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_indexes: Any = None) -> None:
            del vllm_config, engine_indexes

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            listener(engine_idx, scheduler_stats, iteration_stats)

        def record_admission_rejection(self, reason: str) -> None:
            pass

        def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
            pass

        def log_engine_initialized(self) -> None:
            pass

        def log(self) -> None:
            pass

    return StepLogger
