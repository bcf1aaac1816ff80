"""Run each test that failed once more, alone and in a fresh process: `pytest -p tests.flaky`.

A test that then passes is FLAKY: it is named below its first failure, and the run passes. More than `MOST`
flaky tests fail the run, and so does a test that fails again. A flaky test is a bug all the same: mend it
when you see it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

MOST = 2  # flaky tests that a run may have
MOST_AGAIN = 6  # with more failures than this, none is run again: they do not come from chance


class Reruns:
    """The node ids of the tests that failed in a run, and of those that passed when they ran alone."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.flaky: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a failure, of the test itself or of its fixtures."""
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)  # before the terminal prints its summary
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Run the failed ones again; fixtures of the whole run have ended by now."""
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
        """Name the flaky ones."""
        for name in self.flaky:
            terminalreporter.write_line(f"FLAKY {name}: failed, and passed when it ran alone", yellow=True)
        if len(self.flaky) > MOST:
            terminalreporter.write_line(f"more than {MOST} flaky tests fail the run", red=True)


def pytest_configure(config: pytest.Config) -> None:
    """Watch this run."""
    config.pluginmanager.register(Reruns())
