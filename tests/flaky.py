"""Rerun each failed test once, alone and in a fresh process: `pytest -p tests.flaky`.

A test that passes then is FLAKY: its name is printed after its first failure, and the run passes. The run
fails if more than `MOST` tests are flaky, or if a test fails again. A flaky test is still a bug: fix it when
you see it.

With pytest-xdist the controller does this, after its workers have ended. A test in which a worker died has
failed, too.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

MOST = 2  # flaky tests that a run may have
MOST_AGAIN = 6  # with more failures than this no test is rerun: chance does not explain them


class Reruns:
    """The node ids of a run's failed tests, and of those that passed when they ran alone."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.flaky: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record a failure of the test itself or of its fixtures."""
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)  # before the terminal prints its summary
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Rerun the failed tests. All fixtures of the run have ended."""
        if exitstatus != pytest.ExitCode.TESTS_FAILED or not 0 < len(self.failed) <= MOST_AGAIN:
            return
        for name in self.failed:
            print(f"\nonce more, alone: {name}", flush=True)
            again = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
            if subprocess.run(again, cwd=session.config.rootpath, check=False).returncode == 0:
                self.flaky.append(name)
        if len(self.flaky) == len(self.failed) <= MOST:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the flaky tests."""
        for name in self.flaky:
            terminalreporter.write_line(f"FLAKY {name}: failed, and passed when it ran alone", yellow=True)
        if len(self.flaky) > MOST:
            terminalreporter.write_line(f"more than {MOST} flaky tests fail the run", red=True)


def pytest_configure(config: pytest.Config) -> None:
    """Observe this run, unless it is a part of one that another process observes."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reruns())
