"""Run the tests that need a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.gpu.processes import pytest_results
from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import Shape

ROOT = Path(__file__).resolve().parents[3]
_FOLDER = "tests/worker/engine"
_PLUGINS = (
    "pytest_asyncio.plugin",
    "pytest_timeout",
    "xdist.plugin",
    "_hypothesis_pytestplugin",
    pytest_results.__name__,
)


# Most processes that run tests: most of their time is that of Triton's compiler, on one core each.
_PROCESSES = 15


def run(report: Report, shape: Shape | None) -> None:
    """Run pytest in a process. Raises RuntimeError if a test fails or if none has run."""
    # Only the plugins that the tests need, and no cache: the checkout may be read-only.
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    command += [part for name in _PLUGINS for part in ("-p", name)]
    if not report.options.rehearse:
        command += ["-n", str(max(min(_PROCESSES, (os.cpu_count() or 2) - 1), 1))]
    log, found = report.options.out / "tests.log", report.options.out / "tests.jsonl"
    found.unlink(missing_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, _FOLDER],
            cwd=ROOT,
            env=_environment(found, rehearse=report.options.rehearse),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            code: int | None = process.wait(max(report.left - 2, 1))
        except subprocess.TimeoutExpired:
            code = None
            _kill(process)
    results = pytest_results.read(found)
    counts = Counter(result.outcome for result in results)
    slowest = sorted(results, key=lambda result: -result.seconds)[:3]
    report.row(
        "passed",
        counts["passed"],
        "tests",
        note=f"{counts['skipped']} were skipped; slowest: "
        + ", ".join(f"{result.test.rpartition('/')[2]} {result.seconds:.0f} s" for result in slowest),
    )
    failed = [result for result in results if result.outcome == "failed"]
    for result in failed[:20]:
        report.row("failed", note=f"{result.test} - {result.message}"[:400])
    if code is None:
        with log.open("a") as out:  # where pytest would have written them at its end
            out.writelines(f"\n{result.test}\n{result.text}\n" for result in failed)
        raise RuntimeError(f"the tests did not end in time; see {log}")
    if code not in (0, 5) or (not report.options.rehearse and not counts["passed"]):
        last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "no output")
        raise RuntimeError(f"pytest ended with {code}: {last[:200]}; see {log}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End pytest and the processes that run its tests, which would compute beside the next part."""
    own = psutil.Process(process.pid)
    for each in [*own.children(recursive=True), own]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def _environment(found: Path, *, rehearse: bool) -> dict[str, str]:
    made = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", pytest_results.FILE: str(found)}
    if not rehearse:
        # By default, the tests use Triton's interpreter where they see no files of NVIDIA's driver. Some
        # containers have none, though they have a GPU.
        made["TRITON_INTERPRET"] = "0"
    return made
