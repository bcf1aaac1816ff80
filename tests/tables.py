"""Tables that tests fill row by row. The run prints them at its end and writes them to build/.

A row travels with its test's report, so that rows from the worker processes of pytest-xdist arrive too.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

_PROPERTY = "table row"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    table    the table's name, which is also the name of its files
    title    the headline above the printed table
    head     column names
    values   the row as data, for the table's .json file
    """

    table: str
    title: str
    head: Sequence[str]
    cells: Sequence[str]
    values: Mapping[str, Any] = field(default_factory=dict)


def add_row(test: pytest.Item, row: Row) -> None:
    """Add *row* to its table. The caller is *test* or one of its fixtures."""
    test.user_properties.append((_PROPERTY, json.dumps(asdict(row))))


def markdown(rows: Sequence[Row]) -> str:
    """Format *rows*, all of one table, as Markdown."""
    lines = [rows[0].head, ["---"] * len(rows[0].head), *(row.cells for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Tables:
    """Collects the rows of a run, in the order of the reports."""

    def __init__(self) -> None:
        self._tables: dict[str, list[Row]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the rows of a test that has ended."""
        if report.when == "teardown":
            for name, value in report.user_properties:
                if name == _PROPERTY:
                    row = Row(**json.loads(str(value)))
                    self._tables.setdefault(row.table, []).append(row)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print and write each table."""
        for name, rows in self._tables.items():
            terminalreporter.section(rows[0].title)
            terminalreporter.write_line(markdown(rows))
            folder = Path("build")
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.md").write_text(markdown(rows) + "\n")
            if rows[0].values:
                machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
                data = {"machine": machine, "rows": [row.values for row in rows]}
                (folder / f"{name}.json").write_text(json.dumps(data, indent=1))
