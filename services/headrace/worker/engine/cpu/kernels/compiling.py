"""Compile all kernels before the first step: `python -m headrace.worker.engine.cpu.kernels.compiling`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

from headrace.worker.engine.cpu.kernels import decoder_step, paging, sampling
from headrace.worker.engine.cpu.kernels.cache import compile_if_free, is_compiled
from headrace.worker.engine.cpu.kernels.sampling import likelihoods

_THIS_MODULE = "headrace.worker.engine.cpu.kernels.compiling"
_BESIDE = "--beside"  # the argument of the processes of `compile_beside`

# Those that take longest first: processes that compile at the same time end at the same time.
_ENTRY_POINTS = (
    decoder_step.run_on_thread,
    sampling.sample_on_thread,
    paging.attend_on_thread,
    likelihoods.likelihood_on_thread,
)


def compile_beside() -> None:
    """Start to compile the kernels that are not in the cache, in processes beside this one.

    They end with this process. If they fail, `compile_kernels` compiles what is missing.
    """
    missing = sum(not is_compiled(function) for function in _ENTRY_POINTS)
    for _ in range(min(missing, _cores()) - 1):
        process = subprocess.Popen(
            [sys.executable, "-m", _THIS_MODULE, _BESIDE],
            stdin=subprocess.PIPE,  # which closes when this process ends, however it ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        threading.Thread(target=_wait, args=(process,), daemon=True).start()


def _wait(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def compile_kernels(progress: Callable[[str], None]) -> None:
    """Compile the kernels that are not in the cache.

    progress   receives a sentence if that takes long
    """
    if not all(map(is_compiled, _ENTRY_POINTS)):
        progress("compiling kernels: once per version, takes about ten seconds")
        _compile_free()
    # Compiles what another process was to compile and did not.
    paging.attention_entry_point()
    decoder_step.step_entry_point()
    sampling.sampling_entry_point()
    likelihoods.likelihood_entry_point()


def _compile_free() -> None:
    """Compile what is neither in the cache nor being compiled by another process."""
    for function in _ENTRY_POINTS:
        if not is_compiled(function):
            compile_if_free(function)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    if _BESIDE in sys.argv:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        _compile_free()
    else:
        compile_beside()
        compile_kernels(print)
