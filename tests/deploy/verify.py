"""Verify what is deployed, part by part, and print one table: `make verify-deploy`.

    python -m tests.deploy.verify [PART ...]

Each part is a run of tests, or of the images, in a process of its own. What it prints is in
build/verify-deploy/PART.log, and the table is also in build/verify-deploy.md. The table has the reasons for
which parts cannot run on this machine or tests are skipped; these are no failures. The exit status is 1 if a
part fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from tests.deploy.tools import ROOT
from tests.tables import Row, markdown

LOGS = ROOT / "build" / "verify-deploy"
TABLE = ROOT / "build" / "verify-deploy.md"
CANNOT = 2  # the exit status of tests.deploy.images where images cannot be built
PART_SECONDS = 3600


@dataclass(frozen=True)
class Part:
    """A part: the tests that verify it, or the module that does."""

    about: str
    tests: Sequence[str] = ()
    without: Sequence[str] = ()
    module: str = ""


_ACCESS = "tests/deploy/test_access.py"
_TELEMETRY = ("tests/deploy/test_observability.py", "tests/deploy/test_observed_mesh.py")
PARTS = {
    "access": Part(
        "each RPC with each kind of credentials",
        (_ACCESS, "tests/mesh/test_auth.py", "tests/mesh/test_auth_over_tls.py"),
    ),
    "tls": Part("mutual TLS, roles and new certificates", ("tests/mesh/test_tls.py", "tests/tls")),
    "node": Part("a client in Node, over mutual TLS with a token", ("tests/node",)),
    "telemetry": Part("Prometheus, a collector, dashboards and alerts", _TELEMETRY),
    "manifests": Part(
        "what kustomize renders, and the services started with it",
        ("tests/deploy",),
        without=(_ACCESS, *_TELEMETRY),
    ),
    "cluster": Part("services on hosts of their own", ("tests/cluster",)),
    "images": Part("images built, and run as a cluster would", module="tests.deploy.images"),
}


@dataclass
class Result:
    """What a part came to."""

    verdict: str
    seconds: float
    counts: str = ""
    reasons: list[str] = field(default_factory=list)

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The cells of the table."""
        return self.verdict, f"{self.seconds:.0f}", self.counts, "; ".join(self.reasons)


def run(name: str, part: Part) -> Result:
    """Run a part to its end."""
    LOGS.mkdir(parents=True, exist_ok=True)
    report = LOGS / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", *([part.module] if part.module else _pytest(part, report))]
    began = time.monotonic()
    with (LOGS / f"{name}.log").open("w") as log:
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=PART_SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
    seconds = time.monotonic() - began
    if part.module:
        return _of_module(status, seconds, (LOGS / f"{name}.log").read_text().splitlines())
    return of_tests(status, seconds, report)


def _pytest(part: Part, report: Path) -> list[str]:
    ignored = [f"--ignore={path}" for path in part.without]
    return ["pytest", "-p", "tests.flaky", f"--junitxml={report}", *part.tests, *ignored]


def _of_module(status: int, seconds: float, lines: Sequence[str]) -> Result:
    last = lines[-1] if lines else ""
    if status == CANNOT:
        return Result("not run", seconds, reasons=[last])
    return Result("ok" if status == 0 else "FAILED", seconds, counts=last)


def of_tests(status: int, seconds: float, report: Path) -> Result:
    """Return the result of a run of pytest from its exit status and its report.

    A part whose tests were all skipped was not run.
    """
    if not report.exists():
        return Result("FAILED", seconds, reasons=[f"pytest ended with {status}"])
    ends: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        skipped = case.find("skipped")
        if skipped is not None:
            reasons[skipped.get("message", "")] += 1
        failed = case.find("failure") is not None or case.find("error") is not None
        ends["failed" if failed else "skipped" if skipped is not None else "passed"] += 1
    verdict = "ok" if status == 0 else "FAILED"
    if status == 0 and not ends["passed"]:
        verdict = "not run"
    if status == 0 and ends["failed"]:  # they passed when they ran again, see tests.flaky
        ends["flaky"] = ends.pop("failed")
    return Result(
        verdict,
        seconds,
        ", ".join(f"{count} {end}" for end, count in sorted(ends.items()) if count),
        [f"{count} x {reason}" if count > 1 else reason for reason, count in reasons.items()],
    )


def table(results: dict[str, Result]) -> str:
    """Return the table of all parts."""
    head = ("part", "what", "result", "seconds", "checks", "not run because")
    return markdown(
        [
            Row("verify-deploy", "", head, (name, PARTS[name].about, *result.cells))
            for name, result in results.items()
        ]
    )


def main() -> int:
    """Run the parts. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.deploy.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"by default all: {', '.join(PARTS)}")
    chosen = parser.parse_args().parts or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    results = {}
    for name in chosen:
        print(f"{name}: {PARTS[name].about} ...", flush=True)
        results[name] = result = run(name, PARTS[name])
        print(f"{name}: {result.verdict} after {result.seconds:.0f} s", flush=True)
    TABLE.write_text(table(results) + "\n")
    print(f"\n{table(results)}")
    return 1 if any(result.verdict == "FAILED" for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
