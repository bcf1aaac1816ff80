"""The table of checks that is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One row: what was checked, of which image, whether it holds, and what was seen."""

    image: str
    claim: str
    holds: bool
    seen: str = ""


def table(checks: Sequence[Check]) -> str:
    """Return the checks as lines for a terminal."""
    images = max(len(check.image) for check in checks)
    claims = max(len(check.claim) for check in checks)
    rows = []
    for check in checks:
        verdict = "ok  " if check.holds else "FAIL"
        rows.append(f"{verdict}  {check.image:<{images}}  {check.claim:<{claims}}  {check.seen}".rstrip())
    failed = sum(not check.holds for check in checks)
    return "\n".join([*rows, f"{len(checks) - failed} of {len(checks)} checks hold"])
