"""`make verify-deploy` reports what its parts came to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.deploy.tools import ROOT
from tests.deploy.verify import PARTS, Result, of_tests, table

TESTS = """
import pytest

def test_holds(): pass

def test_breaks(): assert BREAKS != "yes"

@pytest.mark.parametrize("number", [1, 2])
def test_needs_a_tool(number): pytest.skip("a tool is not installed")
"""


def outcome(folder: Path, *arguments: str, breaks: str = "no") -> Result:
    """Run the tests above, and return what is reported of them."""
    (folder / "test_some.py").write_text(TESTS.replace("BREAKS", repr(breaks)))
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "--rootdir", str(folder), f"--junitxml={report}", *arguments]
    done = subprocess.run([*command, "test_some.py"], cwd=folder, capture_output=True, check=False)
    return of_tests(done.returncode, 1.0, report)


def test_a_part_is_ok_if_its_tests_pass_and_says_why_others_were_skipped(tmp_path: Path) -> None:
    assert outcome(tmp_path) == Result("ok", 1.0, "2 passed, 2 skipped", ["2 x a tool is not installed"])


def test_a_part_fails_with_one_of_its_tests(tmp_path: Path) -> None:
    seen = outcome(tmp_path, breaks="yes")

    assert (seen.verdict, seen.counts) == ("FAILED", "1 failed, 1 passed, 2 skipped")


def test_a_part_whose_tests_are_all_skipped_was_not_run(tmp_path: Path) -> None:
    assert outcome(tmp_path, "-k", "tool").verdict == "not run"


def test_a_part_without_tests_fails(tmp_path: Path) -> None:
    assert outcome(tmp_path, "-k", "nothing").verdict == "FAILED"
    assert of_tests(4, 1.0, tmp_path / "missing.xml").verdict == "FAILED"


def test_the_table_has_a_row_for_each_part() -> None:
    lines = table({name: Result("ok", 2.0, "1 passed") for name in PARTS}).splitlines()

    assert len(lines) == 2 + len(PARTS)
    assert lines[2].startswith("| access | ")


def test_the_tests_of_the_parts_exist() -> None:
    paths = [path for part in PARTS.values() for path in (*part.tests, *part.without)]

    assert [path for path in paths if not (ROOT / path).exists()] == []
