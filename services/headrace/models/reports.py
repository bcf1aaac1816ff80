"""What is told of a model on its way: how far it has come, or why it cannot be had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

INSTEAD = "give a local folder, a .gguf file or a hub id (org/name) instead"


class ModelUnavailable(Exception):
    """A model cannot be had. The message says what was tried, why it failed, and what to do."""


@dataclass(frozen=True)
class Progress:
    """How far one model has come."""

    model: str  # as the user wrote it
    stage: str  # "waiting" (another process fetches it), "downloading", "verifying"
    done: int  # bytes of the finished model that this stage is through with
    total: int  # bytes; 0 while unknown


class Report(Protocol):
    """Hears about progress, from the thread that calls `fetch` or `resolve`, or one of the hub's."""

    def __call__(self, progress: Progress, /) -> None: ...


def silent(progress: Progress, /) -> None:
    """Tell nobody."""
