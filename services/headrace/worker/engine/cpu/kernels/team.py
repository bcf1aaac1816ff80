"""Run compiled functions on torch's own OpenMP threads.

A second pool of threads would fight with torch's for the cores: both wait for work by spinning. torch's
wheels bring GNU's OpenMP, whose entry points are plain C functions: `GOMP_parallel` runs one function on
every thread, `GOMP_barrier` lets them wait for each other.

A thread that fails must not leave the others waiting at a barrier that it never reaches. So a team has a
`Watch`: the number of the barrier before which a thread failed, and how many barriers each thread has passed.
Who fails still goes to that one barrier; behind it all threads see that somebody failed, and leave. All of
them also meet when they are done, so that no failure comes after the last barrier.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, types

from headrace.worker.engine.cpu.kernels import machine
from headrace.worker.engine.cpu.kernels.elementwise import pointer


def _openmp() -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL("libgomp.so.1")  # the one that torch has loaded, if it has
        return found if hasattr(found, "GOMP_parallel") else None
    except OSError:
        return None


_LIBRARY = _openmp()
AVAILABLE = _LIBRARY is not None

# Without OpenMP there is one thread: no number but 0, and nobody to wait for.
_ALONE = (
    ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0),
    ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1),
    ctypes.CFUNCTYPE(None)(lambda: None),
)


def _address(name: str, alone: Any) -> int:
    function = getattr(_LIBRARY, name) if _LIBRARY is not None else alone
    return ctypes.cast(function, ctypes.c_void_p).value or 0


llvmlite.binding.add_symbol("headrace_thread", _address("omp_get_thread_num", _ALONE[0]))
llvmlite.binding.add_symbol("headrace_threads", _address("omp_get_num_threads", _ALONE[1]))
llvmlite.binding.add_symbol("headrace_barrier", _address("GOMP_barrier", _ALONE[2]))

thread_number = types.ExternalFunction("headrace_thread", types.int32())
# How many there are: OpenMP may give fewer than were asked for (OMP_THREAD_LIMIT, OMP_DYNAMIC).
thread_count = types.ExternalFunction("headrace_threads", types.int32())
_meet = types.ExternalFunction("headrace_barrier", types.void())

# What `require` may find wrong.
BOUNDS = ("nothing", "token", "position", "block", "sampled token")
TOKEN, POSITION, KV_BLOCK, SAMPLED = 1, 2, 3, 4

_LINE = 64  # bytes in a cache line


class KernelFault(Exception):
    """A thread failed, and the step ended for all: what it was to write holds nothing of use."""


class Watch:
    """Knows of one step whether a thread failed; for at most *threads* threads.

    address   what kernels are given: one line for all (the barrier before which one failed, and what
              `require` found), then one for each thread (the barriers that it has passed)
    """

    def __init__(self, threads: int) -> None:
        self._lines = np.zeros(((1 + threads), _LINE // 8), np.int64)
        self.address = int(self._lines.ctypes.data)

    def reset(self) -> None:
        """Before the next step."""
        self._lines.fill(0)

    def check(self) -> None:
        """Raise KernelFault if a thread failed."""
        failed, what, value, limit = self._lines[0, :4].tolist()
        if what:
            raise KernelFault(f"{BOUNDS[what]} {value} is not among {limit}")
        if failed:
            raise KernelFault("a kernel failed; HEADRACE_CHECK_KERNELS=1 checks where it reads and writes")


@machine.compiled
def barrier(watch: int) -> None:
    """Wait for all threads. Raises where one of them has failed, in all of them."""
    failed = carray(pointer(watch), (4,), np.int64)
    passed = carray(pointer(watch + _LINE * (1 + thread_number())), (1,), np.int64)
    passed[0] += 1
    _meet()
    if 0 < failed[0] <= passed[0]:
        raise RuntimeError("another thread failed")


@machine.compiled
def fail(watch: int) -> None:
    """This thread raised; called where that is caught."""
    failed = carray(pointer(watch), (4,), np.int64)
    passed = carray(pointer(watch + _LINE * (1 + thread_number())), (1,), np.int64)
    if failed[0] == 0:
        failed[0] = passed[0] + 1


@machine.compiled
def finish(watch: int) -> None:
    """This thread is done, well or not: meet the others unless they have been met because one failed."""
    failed = carray(pointer(watch), (4,), np.int64)
    passed = carray(pointer(watch + _LINE * (1 + thread_number())), (1,), np.int64)
    if failed[0] == 0 or passed[0] < failed[0]:
        passed[0] += 1
        _meet()


@machine.compiled
def require(watch: int, what: int, value: int, limit: int) -> None:
    """Raise unless 0 <= value < limit; *what* is an index of BOUNDS."""
    if value < 0 or value >= limit:
        found = carray(pointer(watch), (4,), np.int64)
        found[1], found[2], found[3] = what, value, limit
        raise IndexError("out of bounds")


@machine.emitted([types.int64], types.int64)
def claim(b: Any, counter: Any) -> Any:
    """Count one further, and return the number before: who gets it does that piece of work."""
    place = b.inttoptr(counter, machine.I64.as_pointer())
    return b.atomic_rmw("add", place, ir.Constant(machine.I64, 1), "monotonic")


def run(function: Any, data: int, threads: int, watch: Watch) -> None:
    """Call a numba cfunc(voidptr) once on each of at most *threads* threads, and wait for all.

    The GIL is released meanwhile. The function catches what it raises, see `fail` and `finish`. Raises
    KernelFault.
    """
    watch.reset()
    if _LIBRARY is None or threads == 1:
        _call(function.address)(data)
    else:
        _LIBRARY.GOMP_parallel(
            ctypes.c_void_p(function.address), ctypes.c_void_p(data), ctypes.c_uint(threads), ctypes.c_uint(0)
        )
    watch.check()


_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _call(address: int) -> Any:
    return _Function(address)
