"""Print the figures of one part as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def show_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the columns are as wide as they need to be."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("what", "stage", "process") else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def milliseconds(seconds: float) -> str:
    """Return a time in milliseconds, with as many digits as are useful."""
    return f"{seconds * 1e3:.1f}" if seconds >= 0.01 else f"{seconds * 1e3:.2f}"
