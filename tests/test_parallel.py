"""Several processes run the suite: quiet tests run alone, and all rows of tables are printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFTEST = """
from tests import parallel
from tests.tables import Tables

def pytest_configure(config):
    parallel.take_part(config)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Tables())
"""
# Each test writes when it ran, and adds a row.
SUITE = """
import time
from pathlib import Path

import pytest

from tests.tables import Row, add_row

@pytest.mark.parametrize("number", range(4))
def test_it(number, request):
    cells = [{name!r}, str(number)]
    add_row(request.node, Row("spans", "all spans", ["file", "number"], cells, {{"n": number}}))
    begin = time.monotonic()
    time.sleep(0.05)
    Path("{name}-%d.span" % number).write_text("%r %r" % (begin, time.monotonic()))
"""


def test_quiet_tests_run_alone_and_all_rows_are_printed(tmp_path: Path) -> None:
    names = ("plain_1", "quiet", "plain_2", "plain_3")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = quiet\n")
    for name in names:
        mark = "\npytestmark = pytest.mark.quiet\n" if name == "quiet" else ""
        (tmp_path / f"test_{name}.py").write_text(SUITE.format(name=name) + mark)

    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "no:cacheprovider", "-n", "3"],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # starts sooner
        },
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    spans = {
        name: [tuple(map(float, file.read_text().split())) for file in sorted(tmp_path.glob(f"{name}-*"))]
        for name in names
    }
    assert all(len(each) == 4 for each in spans.values())
    begin, end = spans["quiet"][0][0], spans["quiet"][-1][1]
    for name in names:
        assert name == "quiet" or all(until <= begin or since >= end for since, until in spans[name]), spans
    rows = {f"| {name} | {number} |" for name in names for number in range(4)}
    printed = ran.stdout[ran.stdout.index("all spans") :]
    assert rows <= set(printed.splitlines())
    assert rows <= set((tmp_path / "build" / "spans.md").read_text().splitlines())
    assert '"n": 3' in (tmp_path / "build" / "spans.json").read_text()
