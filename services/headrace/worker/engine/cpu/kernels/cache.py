"""Compile the entry points of kernels once for all processes of a machine, and keep the result.

numba keeps compiled functions in a folder, but it checks only the file of the function itself, not those of
the functions it calls. Each version of the sources, of numba and of the CPU therefore has a folder of its
own: `$NUMBA_CACHE_DIR` if that is set, else one in the cache of Headrace.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from numba import cfunc, types

from headrace.models import cache_folder
from headrace.worker.engine.cpu.kernels.machine import CHECKED


def compile_entry_point(function: Callable[[Any], None]) -> Any:
    """Compile a function(voidptr) for calls from C, or load it from the cache.

    If several processes need the same function, one compiles it and the others wait.
    """
    if is_compiled(function):
        return _compiled(function)
    with _locked(function, wait=True):
        return _compiled(function)


def compile_if_free(function: Callable[[Any], None]) -> None:
    """Compile a function(voidptr) into the cache, unless another process is compiling it."""
    with _locked(function, wait=False) as free:
        if free:
            _compiled(function)


def _compiled(function: Callable[[Any], None]) -> Any:
    return cfunc(types.void(types.voidptr), nopython=True, cache=True)(function)


def is_compiled(function: Callable[[Any], None]) -> bool:
    """Return whether the cache has the function."""
    # The code, and not the index, which numba writes before it.
    return any(_set_up().rglob(f"*.{function.__name__}-*.nbc"))


@functools.cache
def _set_up() -> Path:
    """Configure numba, and return the folder of compiled functions."""
    numba.config.BOUNDSCHECK = 1 if CHECKED else None
    if "NUMBA_CACHE_DIR" not in os.environ or CHECKED:
        numba.config.CACHE_DIR = str(_folder())
    return Path(numba.config.CACHE_DIR)


def _folder() -> Path:
    state = hashlib.sha256(f"{CHECKED} {numba.__version__} {llvmlite.binding.get_host_cpu_name()}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        # numba compiles again if the time of a file has changed.
        state.update(f"{path} {path.stat().st_mtime_ns}".encode() + path.read_bytes())
    folder = cache_folder() / "kernels" / state.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:  # the cache is read-only: compile at each start
        return Path(tempfile.mkdtemp(prefix="headrace-kernels-"))


@contextmanager
def _locked(function: Callable[[Any], None], *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a function between processes, and yield whether it is held.

    wait   whether to wait while another process holds it

    The system releases it when a process ends.
    """
    path = _set_up() / f"{function.__name__}.lock"
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except (ImportError, OSError):  # compiling twice only takes longer
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
