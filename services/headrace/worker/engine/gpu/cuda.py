"""All operations that only CUDA supports: pinned copies, events, graphs, errors and memory statistics.

Each function is a few calls of torch. The logic around them is in modules that also run on a CPU.
`current_device`, `to_device`, `HostBuffer` and `Fetch` also work on a CPU.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine.interface import EngineBroken

# In the messages of errors: of CUDA itself, of its driver and of Triton; and of `waiting_forbidden`.
_OF_CUDA = ("CUDA error", "CUDA driver error", "[CUDA]")
_WAITED = "synchronizing CUDA operation"


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one of this thread in a block: Triton launches kernels there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device asynchronously.

    The copy reads pinned memory, which torch's caching allocator does not reuse before the copy is complete.
    """
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class HostBuffer:
    """Pinned memory for int32 inputs, which is copied to the device again and again.

    numbers   its size
    """

    def __init__(self, numbers: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._tensor = torch.zeros(numbers, dtype=torch.int32, pin_memory=self._cuda)
        self._array: npt.NDArray[np.int32] = self._tensor.numpy()
        self._copied: torch.cuda.Event | None = None

    def array(self) -> npt.NDArray[np.int32]:
        """Return the buffer to write to; waits until the last copy has read it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._array

    def copy_to(self, tensor: torch.Tensor, numbers: int) -> None:
        """Queue a copy of the first *numbers* to a tensor on the device."""
        tensor[:numbers].copy_(self._tensor[:numbers], non_blocking=True)
        if self._cuda:
            self._copied = torch.cuda.current_stream(tensor.device).record_event()


class Fetch:
    """An asynchronous copy of a tensor to the host, queued after the work that computes it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._host = tensor.clone()
        else:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            # The stream of the tensor's device, which may not be the current device of this thread.
            self._copied = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> torch.Tensor:
        """Wait for the copy, and return the tensor on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Let calls that wait for the device raise RuntimeError inside the block."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the mode as a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class GraphPool:
    """Captures functions as CUDA graphs that share one memory pool for their temporary tensors.

    Sharing is safe because graphs are replayed one after the other, and nothing reads their temporary tensors
    later. Capture the largest graph first: the smaller ones reuse its memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def waits(self, run: Callable[[], None]) -> str:
        """Return why *run* cannot be captured: what it waits for. Empty if it only queues work.

        A capture that fails cannot be undone: torch 2.11's allocator then stays in its capturing state, and
        the next `empty_cache` raises (https://github.com/pytorch/pytorch/pull/180395). So this is tried
        before.
        """
        run()  # the first call may wait, to load kernels and allocate workspaces
        try:
            with waiting_forbidden():
                run()
        except RuntimeError as error:
            if _WAITED not in str(error):
                raise
            return str(error).splitlines()[0]
        return ""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture the work that *run* queues, and return a function that queues it again in one launch.

        Raises RuntimeError if *run* cannot be captured; `waits` finds the usual reason before.
        """
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            try:
                return self._capture(run, before)
            finally:
                # After a failed capture, its own stream is still the current one.
                torch.cuda.set_stream(before)

    def _capture(self, run: Callable[[], None], before: torch.cuda.Stream) -> Callable[[], None]:
        # The first calls load and compile kernels and allocate workspaces, which must not be captured.
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                run()
        before.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device during the capture.
        mode = "thread_local"
        inference = torch.is_inference_mode_enabled()
        # The first capture allocates the state of torch's generator, which each capture writes. An inference
        # tensor could not be written by captures outside of this mode.
        with (
            torch.inference_mode(False),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode),
            torch.inference_mode(inference),
        ):
            run()
        return graph.replay


def as_broken(error: Exception) -> Exception:
    """Return *error*, as `EngineBroken` if the device cannot compute any more after it.

    An illegal access, a failed assertion or an uncorrectable memory error makes every later call fail. Too
    little memory does not: the cache of torch's allocator is emptied, so that the next step has what it held.
    """
    if is_out_of_memory(error):
        torch.cuda.empty_cache()  # does nothing before CUDA is used
        return error
    # Triton and cuBLAS report such errors as RuntimeError.
    sticky = isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_CUDA)
    )
    return EngineBroken(str(error).splitlines()[0]) if sticky else error


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the device, or pinned memory, had too little memory for a call.

    Only torch's allocator raises OutOfMemoryError. To launch a graph or a kernel, to load a kernel, to pin
    memory and to begin with cuBLAS on another thread take memory besides it.
    """
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in _OF_CUDA)
        and any(words in str(error) for words in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))
    )


def free_device_bytes(device: torch.device) -> int:
    """Return how much can still be allocated, including unused memory in torch's cache."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # See `probes.limit_memory`.
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(min(free, allowed - torch.cuda.memory_reserved(device)), 0)


def peak_device_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """Call *run*, and return the peak of the memory that it takes beyond what is allocated before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
