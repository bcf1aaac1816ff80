"""One answer, as it is logged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """One answer.

    valid   whether it has the form
    """

    id: str
    arm: str
    valid: bool
    right: bool
    tokens: int
    text: str
    calls: list[dict[str, Any]] | None = None
    logprobs: list[float] = field(default_factory=list)
