"""Run the tests that need a GPU."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import Shape

ROOT = Path(__file__).resolve().parents[3]
_FOLDER = "tests/worker/engine"
_PLUGINS = ("pytest_asyncio.plugin", "pytest_timeout", "xdist.plugin", "_hypothesis_pytestplugin")


# Most processes that run tests: most of their time is that of Triton's compiler, on one core each.
_PROCESSES = 12


def run(report: Report, shape: Shape | None) -> None:
    """Run pytest in a process. Raises RuntimeError if a test fails or if none has run."""
    # Only the plugins that the tests need, and no cache: the checkout may be read-only.
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    command += [part for name in _PLUGINS for part in ("-p", name)]
    if not report.options.rehearse:
        command += ["-n", str(max(min(_PROCESSES, (os.cpu_count() or 2) - 1), 1))]
    log = report.options.out / "tests.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--durations=5", _FOLDER],
            cwd=ROOT,
            env=_environment(rehearse=report.options.rehearse),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            code: int | None = process.wait(max(report.left - 2, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # prints what has run
            code = None
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
    text = log.read_text()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    report.row("passed", counts.get("passed", 0), "tests", note=f"{counts.get('skipped', 0)} were skipped")
    for line in re.findall(r"^(?:FAILED|ERROR) (.*)$", text, re.MULTILINE)[:20]:
        report.row("failed", note=line[:300])
    if code is None:
        raise RuntimeError(f"the tests did not end in time; see {log}")
    if code not in (0, 5) or (not report.options.rehearse and not counts.get("passed")):
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
        raise RuntimeError(f"pytest ended with {code}: {last[:200]}; see {log}")


def _environment(*, rehearse: bool) -> dict[str, str]:
    made = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if not rehearse:
        # By default, the tests use Triton's interpreter where they see no files of NVIDIA's driver. Some
        # containers have none, though they have a GPU.
        made["TRITON_INTERPRET"] = "0"
    return made
