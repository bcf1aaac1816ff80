"""`make gpu-rehearsal` runs every part of the benchmark of GPU workers, so that it works with a GPU too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.jobs import PARTS

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(1800)  # two minutes on two idle cores
def test_the_rehearsal_measures_every_part(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["part"] for row in written["rows"]} == set(PARTS)
    assert not [name for name, end in written["ended"].items() if end["error"] or end["skipped"]]
    assert "failed:" not in (tmp_path / "gpu.md").read_text()
