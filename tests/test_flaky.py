"""A test that fails once is named as flaky. A second failure, or more than two flaky tests, fail the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flaky import MOST, MOST_AGAIN

ROOT = Path(__file__).parents[1]
# Each test counts its runs in a file, and its first runs fail or end the process.
SUITE = """
import os
from pathlib import Path
import pytest

@pytest.mark.parametrize("failures", {failures})
def test_it(failures, request):
    runs = Path(request.node.name)
    runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
    if len(runs.read_text()) <= failures and {dies}:
        os._exit(1)
    assert len(runs.read_text()) > failures, "one of the first runs"
"""
SEVERAL = ["-p", "xdist", "-n", "2"]
CONFTEST = """
from tests import parallel

def pytest_configure(config):
    parallel.take_part(config)
"""


def run(folder: Path, failures: list[int], *options: str, dies: bool = False) -> tuple[bool, str]:
    """Run a suite of such tests. Returns whether it passed, and what it printed."""
    (folder / "test_suite.py").write_text(SUITE.format(failures=failures, dies=dies))
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\n")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.flaky", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # starts sooner
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode == 0, ran.stdout


@pytest.mark.parametrize(
    ("failures", "options", "passes", "flaky"),
    [
        ([1, 0], [], True, 1),
        ([1] * MOST, [], True, MOST),
        ([1] * (MOST + 1), [], False, MOST + 1),
        ([1, 2], [], False, 1),
        ([1] * (MOST_AGAIN + 1), [], False, 0),
        ([1, 0, 0, 0], SEVERAL, True, 1),
        ([1, 2], SEVERAL, False, 1),
    ],
)
def test_failures_are_run_once_more(
    tmp_path: Path, failures: list[int], options: list[str], passes: bool, flaky: int
) -> None:
    passed, printed = run(tmp_path, failures, *options)

    assert passed is passes, printed
    assert printed.count("FLAKY ") == flaky, printed
    assert "one of the first runs" in printed, "the first failure is printed"


@pytest.mark.parametrize(("failures", "passes"), [(1, True), (2, False)])
def test_a_test_in_which_a_process_died_is_run_once_more(tmp_path: Path, failures: int, passes: bool) -> None:
    """The tests after it run once, in the process that replaces the dead one."""
    passed, printed = run(tmp_path, [0, failures, 0], *SEVERAL, dies=True)

    assert passed is passes, printed
    assert printed.count("FLAKY ") == passes, printed
    assert sorted(file.read_text() for file in tmp_path.glob("test_it*")) == ["x", "x", "xx"]
