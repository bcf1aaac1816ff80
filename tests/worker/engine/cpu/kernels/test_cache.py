"""Kernels are compiled once for all processes of a machine, and only when they are needed."""

from __future__ import annotations

import fcntl
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from numba.core.dispatcher import Dispatcher

from headrace.worker.engine.cpu import kernels
from headrace.worker.engine.cpu.kernels import cache, compiling, decoder_step, paging, sampling
from headrace.worker.engine.cpu.kernels.sampling import likelihoods

IMPORT = "import headrace.worker.engine.cpu.kernels.compiling"
# A kernel that compiles quickly stands for all. numba caches only functions of files.
KERNEL = """
import sys

import numba

from headrace.worker.engine.cpu.kernels.cache import compile_entry_point, is_compiled


def kernel(data):
    pass


if __name__ == "__main__":
    cached = is_compiled(kernel)
    print(cached, compile_entry_point(kernel).cache_hits)
"""


def start(cache: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        env={"HEADRACE_CACHE": str(cache), "PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )


def printed(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.strip()


def test_importing_the_kernels_writes_nothing(tmp_path: Path) -> None:
    printed(start(tmp_path / "cache", "-c", IMPORT))

    assert not (tmp_path / "cache").exists()


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(KERNEL)

    together = [start(tmp_path / "cache", str(program)) for _ in range(3)]

    hits = sorted(printed(process).split()[1] for process in together)
    assert hits == ["0", "1", "1"]
    assert printed(start(tmp_path / "cache", str(program))) == "True 1"


def test_a_process_that_finds_a_kernel_being_compiled_continues_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise processes that start together would compile one kernel after the other."""
    monkeypatch.setattr(cache, "_set_up", lambda: tmp_path)
    compiled: list[Any] = []
    monkeypatch.setattr(cache, "_compiled", compiled.append)
    busy, free = compiling._ENTRY_POINTS[:2]
    with (tmp_path / f"{busy.__name__}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        cache.compile_if_free(busy)
        cache.compile_if_free(free)

    assert compiled == [free]


def test_processes_that_compile_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", compiling._THIS_MODULE, compiling._BESIDE]
    with subprocess.Popen(
        command,
        env={"HEADRACE_CACHE": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        stdin=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.close()

        assert process.wait(timeout=30) == 1


def test_a_worker_compiles_itself_what_the_processes_beside_it_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_set_up", lambda: tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    compiled: list[Any] = []
    monkeypatch.setattr(cache, "_compiled", compiled.append)
    for module in (paging, decoder_step, sampling, likelihoods):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                monkeypatch.setattr(module, value.__name__, value.__wrapped__, raising=False)
    reported: list[str] = []

    compiling.compile_beside()
    compiling.compile_kernels(reported.append)

    assert set(compiled) == set(compiling._ENTRY_POINTS)
    assert len(reported) == 1


def test_no_two_kernels_have_the_same_name() -> None:
    """Else a process could compute one with the code that another process has compiled for the other."""
    modules = [
        import_module(found.name) for found in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + ".")
    ]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)}
    names = [(kernel.py_func.__module__, kernel.py_func.__qualname__) for kernel in found]

    assert len(names) > 40
    assert sorted(names) == sorted(set(names))
    assert all(module.startswith(kernels.__name__) for module, _ in names)
