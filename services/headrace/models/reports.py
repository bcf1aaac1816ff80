"""The progress and the failure of fetching a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

ALTERNATIVES = "give a local folder, a .gguf file or a hub id (org/name) instead"


class ModelUnavailable(Exception):
    """A model is not available. The message states what was tried, why it failed, and what to do."""


@dataclass(frozen=True)
class FetchProgress:
    """The progress of fetching one model."""

    model: str  # as the user wrote it
    stage: str  # "waiting" (another process fetches it), "downloading", "verifying"
    done: int  # bytes of the model that this stage has processed
    total: int  # bytes of the model; 0 while unknown


class ProgressCallback(Protocol):
    """Receives progress, in the thread that calls `fetch` or `resolve` or in a thread of the hub's client."""

    def __call__(self, progress: FetchProgress, /) -> None: ...


def ignore_progress(progress: FetchProgress, /) -> None:
    """Do nothing."""
