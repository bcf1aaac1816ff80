"""Compile all kernels before the first step: `python -m headrace.worker.engine.cpu.kernels.compiling`."""

from __future__ import annotations

from collections.abc import Callable

from headrace.worker.engine.cpu.kernels import decoder_step, paging, sampling
from headrace.worker.engine.cpu.kernels.cache import is_compiled
from headrace.worker.engine.cpu.kernels.sampling import likelihoods

_ENTRY_POINTS = (
    paging.attend_on_thread,
    decoder_step.run_on_thread,
    sampling.sample_on_thread,
    likelihoods.likelihood_on_thread,
)


def compile_kernels(progress: Callable[[str], None]) -> None:
    """Compile the kernels that are not in the cache.

    progress   receives a sentence if that takes long
    """
    if not all(map(is_compiled, _ENTRY_POINTS)):
        progress("compiling kernels: once per version, takes about half a minute")
    paging.attention_entry_point()
    decoder_step.step_entry_point()
    sampling.sampling_entry_point()
    likelihoods.likelihood_entry_point()


if __name__ == "__main__":
    compile_kernels(print)
