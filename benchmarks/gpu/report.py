"""What a measurement receives: its options, what earlier parts found, and where its figures go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.limits import Ceilings


@dataclass(frozen=True)
class Options:
    """What applies to all parts.

    rehearse     tiny shapes on the CPU, with Triton's interpreter: shows that the script works
    device       as for a worker, such as cuda:0
    dtype        of the models
    share        share of the requests of the workload, for the engine and the mesh
    peer_share   the same where it is compared with others, which are slower
    out          folder of the results and of the logs of all processes
    """

    rehearse: bool
    device: str
    dtype: str
    share: float
    peer_share: float
    out: Path

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**self.__dict__, "out": str(self.out)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Options:
        """Return the options that `as_json` wrote."""
        return cls(**{**values, "out": Path(values["out"])})


@dataclass
class Report:
    """Collects the figures of one job.

    send      sends an event to the process that prints and keeps it
    facts     what earlier jobs have found; `fact` adds to it
    ends      time.monotonic() at which the job should be done
    """

    part: str
    model: str
    options: Options
    send: Callable[[dict[str, Any]], None]
    facts: dict[str, Any] = field(default_factory=dict)
    ends: float = float("inf")

    def row(
        self,
        what: str,
        value: float | None = None,
        unit: str = "",
        *,
        limit: float | None = None,
        goal: tuple[float, float] | None = None,
        note: str = "",
    ) -> None:
        """Report a figure; see `results.Row`. A rehearsal's have no limits: they are figures of a CPU."""
        if self.options.rehearse:
            limit, goal = None, None
        least, good = goal or (None, None)
        self.send(
            {
                "row": {
                    "part": self.part,
                    "model": self.model,
                    "what": what,
                    "value": None if value is None else float(value),
                    "unit": unit,
                    "limit": limit,
                    "least": least,
                    "good": good,
                    "note": note,
                }
            }
        )

    def say(self, text: str) -> None:
        """Print a line that is not a result."""
        self.send({"say": f"{self.part} {self.model}: {text}" if self.model else f"{self.part}: {text}"})

    def fact(self, name: str, value: Any) -> None:
        """Keep a value for later jobs."""
        self.facts[name] = value
        self.send({"fact": [name, value]})

    @property
    def left(self) -> float:
        """Seconds until the job should be done."""
        return self.ends - time.monotonic()

    @property
    def ceilings(self) -> Ceilings | None:
        """What the card can do, if the part `card` has measured it."""
        return Ceilings.of(self.facts)
