"""Carry packages to a machine without a network: `python -m benchmarks.gpu wheels DIR` downloads them.

They are those that the measurements need besides torch, Triton and transformers with what these need, for
CPython 3.12 on Linux x86-64. A wheel is a zip file, so the machine needs no pip to unpack them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.results import number

_CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
# Names of constraints.txt, which has the versions.
PACKAGES = (
    # Of the services.
    "annotated-types",
    "gguf",
    "llguidance",
    "googleapis-common-protos",
    "grpcio",
    "grpcio-channelz",
    "grpcio-health-checking",
    "grpcio-reflection",
    "grpcio-status",
    "opentelemetry-api",
    "opentelemetry-exporter-http-transport",
    "opentelemetry-exporter-otlp-common",
    "opentelemetry-exporter-otlp-proto-common",
    "opentelemetry-exporter-otlp-proto-grpc",
    "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry-propagator-b3",
    "opentelemetry-proto",
    "opentelemetry-sdk",
    "opentelemetry-semantic-conventions",
    "protobuf",
    "psutil",
    "pydantic",
    "pydantic_core",
    "pydantic-settings",
    "python-dotenv",
    "python-json-logger",
    "typing-inspection",
    "typing_extensions",
    "uvloop",
    # Of the engine.
    "accelerate",
    "sentencepiece",
    # Of the tests.
    "execnet",
    "hypothesis",
    "iniconfig",
    "pluggy",
    "pytest",
    "pytest-asyncio",
    "pytest-timeout",
    "pytest-xdist",
    "sortedcontainers",
)
# The engine imports it, but llvmlite alone has 57 MiB, and many machines have it.
NUMBA = ("llvmlite", "numba")
# pip compares names, so each version of glibc is listed: up to that of Ubuntu 22.04.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 16, -1)] + ["manylinux2014_x86_64"]
_PYTHON = "3.12"


def main(given: Sequence[str]) -> int:
    """Download the wheels. Returns pip's exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu wheels", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--numba", action="store_true", help="also numba and llvmlite, which have 61 MiB")
    arguments = parser.parse_args(given)
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", _PYTHON, "--dest", str(folder)]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    names = [*PACKAGES, *(NUMBA if arguments.numba else ())]
    code = subprocess.run([*command, *pinned(names)], check=False).returncode
    found = list(folder.glob("*.whl"))
    size = sum(path.stat().st_size for path in found)
    print(f"{len(found)} wheels, {number(size / 2**20)} MiB, in {folder}")
    return code


def pinned(names: Sequence[str]) -> list[str]:
    """Return packages with their versions in constraints.txt."""
    lines = _CONSTRAINTS.read_text().splitlines()
    versions = {_plain(name): line for line in lines if (name := line.partition("==")[0]) != line}
    return [versions[_plain(name)] for name in names]


def unpack(wheels: Path, folder: Path) -> None:
    """Unpack all wheels of a folder, so that *folder* can be put on the path.

    Raises FileNotFoundError if there are none.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise FileNotFoundError(f"no wheels in {wheels}: python -m benchmarks.gpu wheels {wheels}")
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    # Modules that a wheel keeps apart by kind; the rest of its .data (scripts, headers) is not needed.
    for kind in ("purelib", "platlib"):
        for data in folder.glob(f"*.data/{kind}/*"):
            data.rename(folder / data.name)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
