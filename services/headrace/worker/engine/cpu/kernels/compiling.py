"""Have all kernels compiled before anybody waits for one, and say so when it takes long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numba

from headrace.worker.engine.cpu.kernels import decoder_step as forward
from headrace.worker.engine.cpu.kernels import paging


def compile_kernels(progress: Callable[[str], None]) -> None:
    """Compile what is not in the cache.

    progress   hears a sentence when there is something to wait for
    """
    if not any(Path(numba.config.CACHE_DIR).rglob("*.nbc")):
        progress("compiling kernels: once for each version, for about half a minute")
    paging.compiled()
    forward.compiled()
