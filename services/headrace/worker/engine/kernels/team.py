"""Run compiled functions on torch's own OpenMP threads.

A second pool of threads would fight with torch's for the cores: both wait for work by spinning. torch's
wheels bring GNU's OpenMP, whose entry points are plain C functions: `GOMP_parallel` runs one function on
every thread, `GOMP_barrier` lets them wait for each other.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types

from headrace.worker.engine.kernels import machine


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
barrier = types.ExternalFunction("headrace_barrier", types.void())


@machine.emitted([types.int64], types.int64)
def claim(b: Any, counter: Any) -> Any:
    """Count one further, and return the number before: who gets it does that piece of work."""
    place = b.inttoptr(counter, machine.I64.as_pointer())
    return b.atomic_rmw("add", place, ir.Constant(machine.I64, 1), "monotonic")


def run(function: Any, data: int, threads: int) -> None:
    """Call a numba cfunc(voidptr) once on each of at most *threads* threads, and wait for all.

    The GIL is released meanwhile.
    """
    if _LIBRARY is None or threads == 1:
        _call(function.address)(data)
    else:
        _LIBRARY.GOMP_parallel(
            ctypes.c_void_p(function.address), ctypes.c_void_p(data), ctypes.c_uint(threads), ctypes.c_uint(0)
        )


_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _call(address: int) -> Any:
    return _Function(address)
