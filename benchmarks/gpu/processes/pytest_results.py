"""A plugin of pytest that writes the result of each test at once, so that a run that is ended keeps them.

It writes lines of JSON, see `Result`, to the file that the variable FILE names. In a run of several
processes, only the one that assigns the tests writes.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

FILE = "BENCHMARK_TEST_RESULTS"


@dataclass(frozen=True)
class Result:
    """What became of a test.

    outcome   passed, failed or skipped
    message   the error in one line, and text, with its traceback; empty if the test passed
    """

    test: str
    outcome: str
    seconds: float
    message: str = ""
    text: str = ""


def read(path: Path) -> list[Result]:
    """Return the results in a file; none if there is no file."""
    # The last line of a process that was killed may be incomplete.
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [Result(**json.loads(line)) for line in lines]


class _Writer:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        text = "" if report.passed else report.longreprtext
        message = str(getattr(crash, "message", text)).strip().partition("\n")[0]
        result = Result(report.nodeid, report.outcome, report.duration, message, text)
        self._file.write(json.dumps(asdict(result)) + "\n")
        self._file.flush()


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(Path(os.environ[FILE])))
