"""A test that fails by chance is named; one that fails again, and more than two by chance, fail the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flaky import MOST

ROOT = Path(__file__).parents[1]
# Each test fails as often as its parameter says, counted in a file.
SUITE = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("failures", {failures})
def test_it(failures, request):
    runs = Path(request.node.name)
    runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
    assert len(runs.read_text()) > failures, "one of the first runs"
"""


@pytest.mark.parametrize(
    ("failures", "passes", "flaky"),
    [
        ([1, 0], True, 1),
        ([1] * MOST, True, MOST),
        ([1] * (MOST + 1), False, MOST + 1),
        ([1, 2], False, 1),
        ([1] * 20, False, 0),
    ],
)
def test_failures_are_run_once_more(tmp_path: Path, failures: list[int], passes: bool, flaky: int) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE.format(failures=failures))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.flaky", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ran.returncode == 0) is passes, ran.stdout
    assert ran.stdout.count("FLAKY ") == flaky, ran.stdout
    assert "one of the first runs" in ran.stdout, "the first failure is printed"
