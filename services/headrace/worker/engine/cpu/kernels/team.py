"""Run compiled functions on torch's own OpenMP threads.

A second thread pool would compete with torch's for the cores, since both wait for work by spinning. torch's
wheels include GNU's OpenMP, whose entry points are plain C functions: `GOMP_parallel` runs a function on
every thread. Its barrier is not used: it enters the kernel each time, to wake threads that may sleep, and a
thread that waits soon sleeps, so a step with 300 barriers takes 5 % longer wherever other processes need the
cores too. Here, a thread that waits looks for the others, and yields its core between looks.

A thread that fails must not leave the others waiting at a barrier that it never reaches. A team therefore has
a `FailureState`: the number of the barrier before which a thread failed, and how many barriers each thread
has passed. A failed thread still enters that barrier. After it, all threads detect the failure and return.
There is also a barrier at the end, so that no failure comes after the last barrier.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, types

from headrace.worker.engine.cpu.kernels import machine
from headrace.worker.engine.cpu.kernels.elementwise import pointer


def _openmp() -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL("libgomp.so.1")  # the library that torch has loaded, if it has loaded one
    except OSError:
        return None
    if not hasattr(found, "GOMP_parallel"):
        return None
    found.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.GOMP_parallel.restype = None
    return found


_LIBRARY = _openmp()
AVAILABLE = _LIBRARY is not None

# Without OpenMP there is one thread, number 0.
_SINGLE_THREAD = (
    ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0),
    ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1),
)

_LIBC = ctypes.CDLL(None)  # the process itself


def _address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _address(name: str, fallback: Any) -> int:
    return _address_of(getattr(_LIBRARY, name) if _LIBRARY is not None else fallback)


llvmlite.binding.add_symbol("headrace_thread", _address("omp_get_thread_num", _SINGLE_THREAD[0]))
llvmlite.binding.add_symbol("headrace_threads", _address("omp_get_num_threads", _SINGLE_THREAD[1]))
llvmlite.binding.add_symbol("headrace_yield", _address_of(_LIBC.sched_yield))

thread_number = types.ExternalFunction("headrace_thread", types.int32())
# The number of threads: OpenMP may provide fewer than requested (OMP_THREAD_LIMIT, OMP_DYNAMIC).
thread_count = types.ExternalFunction("headrace_threads", types.int32())
_yield = types.ExternalFunction("headrace_yield", types.int32())

# The values that `require` checks.
BOUNDS = ("nothing", "token", "position", "block", "sampled token")
TOKEN, POSITION, KV_BLOCK, SAMPLED = 1, 2, 3, 4

CACHE_LINE = 64  # bytes
SPINS = 200  # how often a waiting thread looks for the others before it yields its core: a few microseconds
_X86 = platform.machine().lower() in ("x86_64", "amd64")


class KernelFault(Exception):
    """A thread failed and all threads ended the step; its outputs are invalid."""


class FailureState:
    """Records whether a thread failed in a step; for at most *threads* threads.

    address   the argument of kernels: a cache line for all threads (the barrier before which one failed, and
              the value that `require` rejected), one that counts arrivals at barriers, of all threads, and
              then one per thread (the number of barriers passed)
    """

    def __init__(self, threads: int) -> None:
        self._lines = np.zeros(((2 + threads), CACHE_LINE // 8), np.int64)
        self.address = machine.address(self._lines)

    def reset(self) -> None:
        """Clear the state before the next step."""
        self._lines.fill(0)

    def check(self) -> None:
        """Raise KernelFault if a thread failed."""
        failed, what, value, limit = self._lines[0, :4].tolist()
        if what:
            raise KernelFault(f"{BOUNDS[what]} {value} is out of range: must be from 0 to {limit - 1}")
        if failed:
            raise KernelFault(
                "a kernel failed; set HEADRACE_CHECK_KERNELS=1 to check the bounds of its reads and writes"
            )


@machine.intrinsic([types.int64], types.int64)
def _arrive(b: Any, counter: Any) -> Any:
    """Increment a counter; returns its new value."""
    place = b.inttoptr(counter, machine.I64.as_pointer())
    one = ir.Constant(machine.I64, 1)
    return b.add(b.atomic_rmw("add", place, one, "acq_rel"), one)


@machine.intrinsic([types.int64], types.int64)
def _read(b: Any, counter: Any) -> Any:
    """Return the value of a counter that other threads increment."""
    return b.load_atomic(b.inttoptr(counter, machine.I64.as_pointer()), "acquire", 8)


@machine.intrinsic([])
def _pause(b: Any) -> None:
    """Let the other thread of the core run for a few cycles."""
    if _X86:
        machine.call(b, "llvm.x86.sse2.pause", result=ir.VoidType())


@machine.jit
def _meet(arrived: int, everyone: int) -> None:
    """Arrive at a barrier, and wait until there are *everyone* arrivals."""
    if _arrive(arrived) >= everyone:
        return
    while True:
        for _ in range(SPINS):
            if _read(arrived) >= everyone:
                return
            _pause()
        _yield()


@machine.jit
def barrier(failures: int) -> None:
    """Wait for all threads. Raises in every thread if one of them has failed."""
    failed = carray(pointer(failures), (4,), np.int64)
    passed = carray(pointer(failures + CACHE_LINE * (2 + thread_number())), (1,), np.int64)
    passed[0] += 1
    _meet(failures + CACHE_LINE, passed[0] * thread_count())
    if 0 < failed[0] <= passed[0]:
        raise RuntimeError("another thread failed")


@machine.jit
def fail(failures: int) -> None:
    """Record that this thread failed; called by its exception handler."""
    failed = carray(pointer(failures), (4,), np.int64)
    passed = carray(pointer(failures + CACHE_LINE * (2 + thread_number())), (1,), np.int64)
    if failed[0] == 0:
        failed[0] = passed[0] + 1


@machine.jit
def finish(failures: int) -> None:
    """Wait for all threads at the end, unless they have already met after a failure."""
    failed = carray(pointer(failures), (4,), np.int64)
    passed = carray(pointer(failures + CACHE_LINE * (2 + thread_number())), (1,), np.int64)
    if failed[0] == 0 or passed[0] < failed[0]:
        passed[0] += 1
        _meet(failures + CACHE_LINE, passed[0] * thread_count())


@machine.jit
def require(failures: int, what: int, value: int, limit: int) -> None:
    """Raise unless 0 <= value < limit; *what* is an index of BOUNDS."""
    if value < 0 or value >= limit:
        found = carray(pointer(failures), (4,), np.int64)
        found[1], found[2], found[3] = what, value, limit
        raise IndexError("out of bounds")


@machine.intrinsic([types.int64], types.int64)
def claim(b: Any, counter: Any) -> Any:
    """Take the next work item: increment a counter and return its previous value."""
    place = b.inttoptr(counter, machine.I64.as_pointer())
    return b.atomic_rmw("add", place, ir.Constant(machine.I64, 1), "monotonic")


def run(function: Any, data: int, threads: int, failures: FailureState) -> None:
    """Call a numba cfunc(voidptr) once on each of at most *threads* threads, and wait for all of them.

    The GIL is released during the call. The function must catch its exceptions, see `fail` and `finish`.
    Raises KernelFault.
    """
    failures.reset()
    if _LIBRARY is None or threads == 1:
        _callable(function.address)(data)
    else:
        _LIBRARY.GOMP_parallel(function.address, data, threads, 0)
    failures.check()


_callable = functools.cache(ctypes.CFUNCTYPE(None, ctypes.c_void_p))
