"""The interface to the systems under test: open one, request tokens, leave the block to stop it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.serving.peers import MODELS, Places
from benchmarks.serving.workload import Request

# The peers' interpreters must import nothing of Headrace but `benchmarks`, from the working directory.
ALONE: Mapping[str, str] = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Running(Protocol):
    """A running system."""

    @property
    def pids(self) -> Sequence[int]:
        """The roots of its process trees, for memory and CPU."""
        ...

    @property
    def versions(self) -> Mapping[str, str]:
        """The versions of its packages."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[Sequence[int], None]:
        """Stream the ids of the answer as they arrive; each item is one message."""
        ...


class SystemFailed(Exception):
    """A system did not start, or ended: the message has the end of its log."""


@dataclass(frozen=True)
class Place:
    """Where and how to run a system.

    model     "small" or "large"
    threads   for the model's computation
    logs      a folder for the systems' output
    """

    model: str
    threads: int
    logs: Path
    places: Places

    @property
    def headrace_model(self) -> str:
        """The model's name in Headrace."""
        return MODELS[self.model]


Opener = Callable[[Place], AbstractAsyncContextManager[Running]]


@dataclass(frozen=True)
class System:
    """One line of the table.

    name    PEER or PEER:VARIANT
    open    starts it; the block is entered when it is ready
    needs   returns the files that it requires
    """

    name: str
    open: Opener
    needs: Callable[[Place], Sequence[Path]]

    @property
    def ours(self) -> bool:
        """Whether it is Headrace."""
        return self.name.startswith("headrace")

    def missing(self, place: Place) -> str:
        """Return why it cannot run; empty if it can."""
        absent = [str(path) for path in self.needs(place) if not path.exists()]
        return f"{absent[0]} does not exist: make bench-peers" if absent else ""
