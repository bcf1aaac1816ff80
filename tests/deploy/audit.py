"""Look up all pinned dependencies in PyPI's advisories: `python -m tests.deploy.audit` (or `make audit`).

The advisories need the network, and a mirror of PyPI may lack them: pip-audit then reports that it has found
nothing, with status 0. So a version that is known to be vulnerable is looked up with the others. If it is not
reported, nothing was audited: this is printed, and is an error if HEADRACE_AUDIT=required, as in CI.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy import tools

ROOT = Path(__file__).parent.parent.parent
PINNED = (ROOT / "constraints.txt", *sorted((ROOT / "k8s" / "images").glob("*.txt")))
CANARY = ("jinja2", "2.10")  # CVE-2019-10906, a way out of the sandbox
# Advisories that do not apply, by id, with the reason.
WAIVED: Mapping[str, str] = {}
SECONDS = 120


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    known     whether the advisories could be read
    problem   why not
    found     advisories that are not waived, in words
    skipped   dependencies that the service does not know
    """

    known: bool
    problem: str = ""
    found: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def pins(texts: Iterable[str]) -> set[tuple[str, str]]:
    """Return the names and versions in files of requirements."""
    found = (re.finditer(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE) for text in texts)
    return {(each[1].lower().replace("_", "-"), each[2]) for group in found for each in group}


def judged(report: Mapping[str, Any], waived: Mapping[str, str] = WAIVED) -> Audit:
    """Return the result of a report of pip-audit in JSON, which includes the canary."""
    known, found, skipped = False, [], []
    for entry in report["dependencies"]:
        name, version = entry["name"].lower(), entry.get("version", "")
        if (name, version) == CANARY:
            known = bool(entry.get("vulns"))
        elif "skip_reason" in entry:
            skipped.append(name)
        else:
            for each in entry["vulns"]:
                if not waived.keys() & {each["id"], *each.get("aliases", ())}:
                    fixed = ", ".join(each.get("fix_versions", ())) or "no version"
                    found.append(f"{name} {version}: {each['id']}, fixed in {fixed}")
    if not known:
        return Audit(False, f"the service has no advisory on {' '.join(CANARY)}, which has several")
    return Audit(True, "", tuple(found), tuple(skipped))


def audit(pinned: Iterable[tuple[str, str]], *options: str) -> Audit:
    """Look up *pinned* with pip-audit and these options. Raises tools.Missing."""
    program = tools.find("pip-audit")
    reports: list[Any] = []
    # A file has one version of a name, so the versions that differ between images need several.
    for group in _without_repeats([*pinned, CANARY]):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.writelines(f"{name}=={version}\n" for name, version in group)
            file.flush()
            command = [str(program), "--no-deps", "--disable-pip", "--format", "json", "--timeout", "10"]
            command += ["--progress-spinner", "off", "--requirement", file.name, *options]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
                reports += json.loads(done.stdout)["dependencies"]
            except subprocess.TimeoutExpired:
                return Audit(False, f"the service did not answer within {SECONDS} s")
            except ValueError:
                return Audit(
                    False, (done.stderr.strip().splitlines() or ["pip-audit printed nothing"])[-1][:300]
                )
    return judged({"dependencies": reports})


def _without_repeats(pinned: Iterable[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    groups: list[dict[str, str]] = []
    for name, version in sorted(set(pinned)):
        group = next((each for each in groups if name not in each), None)
        if group is None:
            groups.append(group := {})
        group[name] = version
    return [list(group.items()) for group in groups]


def main() -> int:
    """Audit what is pinned, print the result and return the exit status."""
    wanted = pins(path.read_text() for path in PINNED)
    try:
        result = audit(wanted)
    except tools.Missing as missing:
        result = Audit(False, str(missing))
    if not result.known:
        print(f"audit: NOT DONE: {result.problem}")
        return int(os.environ.get("HEADRACE_AUDIT") == "required")
    for line in result.found:
        print(f"audit: {line}")
    print(f"audit: {len(wanted)} versions, {len(result.found)} advisories, {len(result.skipped)} not on PyPI")
    return int(bool(result.found))


if __name__ == "__main__":
    sys.exit(main())
