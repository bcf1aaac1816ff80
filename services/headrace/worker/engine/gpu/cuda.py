"""All operations that only CUDA supports: pinned copies, events, graphs, FlashAttention, memory statistics.

Each function is a few calls of torch. The logic around them is in modules that also run on a CPU. `to_device`
and `Fetch` also work on a CPU, where they copy nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device asynchronously.

    The copy reads pinned memory, which torch's caching allocator does not reuse before the copy is complete.
    """
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Fetch:
    """An asynchronous copy of a tensor to the host, queued after the work that computes it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            # The stream of the tensor's device, which may not be the current device of this thread.
            self._copied = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> torch.Tensor:
        """Wait for the copy, and return the tensor on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


class GraphPool:
    """Captures functions as CUDA graphs that share one memory pool for their temporary tensors.

    Sharing is safe because graphs are replayed one after the other, and their outputs are outside the pool.
    Capture the largest graph first: the smaller ones reuse its memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture the work that *run* queues, and return a function that queues it again in one launch.

        Raises RuntimeError if *run* waits for the device, as the code of some models does.
        """
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            try:
                return self._capture(run, before)
            finally:
                # After a failed capture, its own stream is still the current one.
                torch.cuda.set_stream(before)

    def _capture(self, run: Callable[[], None], before: torch.cuda.Stream) -> Callable[[], None]:
        # The first calls load and tune kernels and allocate workspaces, which must not be captured.
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                run()
        before.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device during the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


def flash_unsupported_reason(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int
) -> str | None:
    """Return the reason why FlashAttention does not support heads of these dimensions, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} is below 8.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention supports bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if key_dim != value_dim or key_dim % 8 or key_dim > 256:
        return f"head dimensions {key_dim} and {value_dim} are not equal multiples of 8 up to 256"
    return None


def attend_varlen(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    key_counts: torch.Tensor,
    tables: torch.Tensor,
    max_query: int,
    max_keys: int,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    """Compute attention between ragged queries and paged keys and values, with torch's FlashAttention.

    query          [tokens, heads, dim]
    keys, values   [blocks, block_tokens, kv_heads, dim]
    offsets        [rows + 1] int32, start of the queries of each row
    key_offsets    [rows + 1] int32, running sum of `key_counts`; FlashAttention 2 requires it
    key_counts     [rows] int32, number of keys of each row
    tables         [rows, width] int32
    max_query      most queries of a row
    max_keys       an upper bound of the keys of a row
    window         visible keys to the left and right of a query's own key; -1 for all

    Returns [tokens, heads, dim].
    """
    from torch.nn.attention.varlen import varlen_attn

    # Always one split: with several, FlashAttention 2 writes wrong rows for paged keys
    # (https://github.com/pytorch/pytorch/issues/194167), and the number of splits would depend on the batch.
    out = varlen_attn(
        query,
        keys,
        values,
        offsets,
        key_offsets,
        max_query,
        max_keys,
        scale=scale,
        window_size=window,
        enable_gqa=query.shape[1] != keys.shape[2],
        seqused_k=key_counts,
        block_table=tables,
        num_splits=1,
    )
    assert isinstance(out, torch.Tensor)
    return out


def free_device_bytes(device: torch.device) -> int:
    """Return how much can still be allocated, including unused memory in torch's cache."""
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def peak_device_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """Call *run*, and return the peak of the memory that it takes beyond what is allocated before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
