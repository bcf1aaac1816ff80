"""Keep what was measured, and write it as JSON and as a Markdown table after every part."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measured figure, or a sentence where there is none.

    part, model   where it comes from; model is empty if no model took part
    value         the figure, in *unit*; None for a sentence in *note*
    limit         what the hardware allows at most, in the same unit
    least, good   goals: shares of *limit* if there is one, otherwise values
    """

    part: str
    model: str
    what: str
    value: float | None = None
    unit: str = ""
    limit: float | None = None
    least: float | None = None
    good: float | None = None
    note: str = ""

    @property
    def share(self) -> float | None:
        """The value as a share of its limit."""
        return self.value / self.limit if self.value is not None and self.limit else None

    @property
    def verdict(self) -> str:
        """How the value compares with its goals; empty without a goal."""
        reached = self.share if self.limit else self.value
        if reached is None or self.least is None:
            return ""
        if self.good is not None and reached >= self.good:
            return "good"
        return "reached" if reached >= self.least else "missed"


@dataclass
class Results:
    """Everything that one run has found.

    facts     what later parts build on, such as the bandwidth of the card
    ended     per job "part model": seconds, and the error or the reason why it was skipped
    """

    command: str
    date: str
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """The jobs that ended with an error."""
        return [name for name, end in self.ended.items() if end.get("error")]

    def write(self, folder: Path) -> None:
        """Write gpu.json and gpu.md."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{**asdict(row), "share": row.share, "verdict": row.verdict} for row in self.rows]
        written = {
            "command": self.command,
            "date": self.date,
            "facts": self.facts,
            "rows": rows,
            "ended": self.ended,
        }
        (folder / "gpu.json").write_text(json.dumps(written, indent=1))
        (folder / "gpu.md").write_text(self.markdown())

    def markdown(self) -> str:
        """Return the tables: figures, and how each job ended."""
        lines = [
            f"`{self.command}`, {self.facts.get('card', 'unknown card')}, "
            f"{', '.join(f'{name} {version}' for name, version in self.facts.get('versions', {}).items())}, "
            f"{self.date}",
            "",
            "| part | model | what | value | limit | share | goal | note |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in self.rows]
        lines += ["", "| job | seconds | result |", "|---|---|---|"]
        for name, end in self.ended.items():
            result = end.get("error") or end.get("skipped") or "done"
            lines.append(f"| {name} | {end.get('seconds', 0):.0f} | {_one_line(result)} |")
        return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """Write a number with three or more significant digits."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0 or size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def sentence(row: Row) -> str:
    """Describe a row in one line for a terminal."""
    parts = [" ".join(filter(None, (row.part, row.model, row.what)))]
    if row.value is not None:
        parts.append(f"{number(row.value)} {row.unit}".strip())
    if row.share is not None and row.limit is not None:
        parts.append(f"{row.share:.0%} of {number(row.limit)}")
    if row.verdict:
        parts.append(f"goal {_goal(row)}: {row.verdict}")
    return ", ".join([*parts, *([row.note] if row.note else [])])


def _cells(row: Row) -> list[str]:
    return [
        row.part,
        row.model,
        row.what,
        "" if row.value is None else f"{number(row.value)} {row.unit}".strip(),
        "" if row.limit is None else number(row.limit),
        "" if row.share is None else f"{row.share:.0%}",
        f"{_goal(row)}: {row.verdict}" if row.verdict else "",
        _one_line(row.note),
    ]


def _goal(row: Row) -> str:
    bounds = [bound for bound in (row.least, row.good) if bound is not None]
    return " / ".join(f"{bound:.0%}" if row.limit else number(bound) for bound in bounds)


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
