"""One answer, as it is logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Row:
    """One answer.

    id, arm    of its task, and how it was asked for
    calls      of tools; None: it has none that are JSON, or its task has no tools
    logprobs   of its tokens
    """

    id: str
    arm: str
    text: str
    calls: list[dict[str, Any]] | None
    logprobs: list[float]
