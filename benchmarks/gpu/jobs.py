"""Decide what is measured, in which order and process, and how long each measurement may take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

# What can be asked for by name, in the order of the tables.
PARTS = ("card", "tests", "exact", "kernels", "start", "prefill", "decode", "workload", "mesh", "peers")
_ONCE = ("card", "tests", "exact", "kernels")  # without a model
# In one process that loads the model once: prefill fills the KV memory that decode reads.
_OF_AN_ENGINE = ("start", "prefill", "decode", "workload")


@dataclass(frozen=True)
class Job:
    """One part, of one model if the part needs one.

    group     jobs of the same group run in one process, one after the other
    seconds   time limit; the process is ended shortly after it
    least     it is skipped if less time than this is left
    module    that measures it; by default the one of the part
    """

    part: str
    model: str
    group: str
    seconds: float
    least: float
    module: str = ""

    @property
    def name(self) -> str:
        """The part, and the model if there is one."""
        return f"{self.part} {self.model}".strip()


# Seconds on one H100 as expected; a part that is done earlier leaves its time to later ones.
_SECONDS = {
    "card": (20, 5),
    "tests": (120, 30),
    "exact": (75, 20),
    "kernels": (60, 15),
    "start": (60, 25),
    "prefill": (15, 5),
    "decode": (25, 8),
    "workload": (40, 12),
    "mesh": (70, 40),
    "peers": (50, 25),
}
_LARGE = 1.4  # times as much for a model of 8B


def plan(parts: Sequence[str], models: Sequence[str], *, patience: float = 1.0) -> list[Job]:
    """Return the jobs of *parts*, in order: first what other results build on, then what could be missed.

    patience   multiplies all time limits
    """
    return [
        replace(job, seconds=patience * job.seconds, least=patience * job.least)
        for job in _jobs(parts, models)
    ]


def _jobs(parts: Sequence[str], models: Sequence[str]) -> Iterator[Job]:
    for part in _ONCE:
        if part in parts:
            yield _job(part, "", "device")
    for model in models:
        for part in _OF_AN_ENGINE:
            if part in parts:
                yield _job(part, model, f"engine {model}")
    if "exact" in parts:
        # Exact mode of a whole engine, in a process of its own: it is chosen before CUDA starts.
        yield Job("exact", models[0], "exact engine", 90, 30)
    for model in models:
        for part in ("mesh", "peers"):
            if part in parts:
                yield _job(part, model, f"{part} {model}")


def _job(part: str, model: str, group: str) -> Job:
    seconds, least = _SECONDS[part]
    factor = _LARGE if model.endswith("8b") else 1.0
    return Job(part, model, group, factor * seconds, factor * least)
