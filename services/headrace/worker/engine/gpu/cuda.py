"""All that only CUDA can do, in one place: pinned copies, events, graphs, FlashAttention, free memory.

Each function is a few calls of torch; what is decided around them lies in modules that run on a CPU too.
The calls that mean something there (`to_device`, `Fetch`) do the plain thing on a CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring a host tensor to the device without waiting for it.

    The copy starts from pinned memory, which torch's caching allocator keeps until the copy is over.
    """
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Fetch:
    """A tensor on its way to the host: the copy is queued behind what computes it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            # Of that device, whichever one is current on this thread.
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> torch.Tensor:
        """Return the tensor once it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


class GraphPool:
    """Captures functions as CUDA graphs that share one pool of memory for what lives only inside of them.

    Sound because graphs are replayed one after the other, and what they hand out lies outside the pool.
    Capture the largest first: the smaller ones fit into what it took.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture what *run* queues, and return what queues it again at the cost of one launch.

        Raises RuntimeError when *run* waits for the device, as some models' code does.
        """
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            try:
                return self._capture(run, before)
            finally:
                # A capture that fails leaves its own stream as the current one.
                torch.cuda.set_stream(before)

    def _capture(self, run: Callable[[], None], before: torch.cuda.Stream) -> Callable[[], None]:
        # Kernels are loaded, tuned and given workspaces on their first calls, which must not be captured.
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                run()
        before.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


def flash_refusal(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Say why FlashAttention does not take heads of these dimensions here, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} is below 8.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
    if key_dim != value_dim or key_dim % 8 or key_dim > 256:
        return f"heads of {key_dim} and {value_dim} are not of one size, a multiple of 8 up to 256"
    return None


def attend_varlen(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    offsets: torch.Tensor,
    held: torch.Tensor,
    used: torch.Tensor,
    tables: torch.Tensor,
    max_query: int,
    max_keys: int,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    """Attend ragged queries to paged keys and values with torch's FlashAttention.

    query          [tokens, heads, dim]
    keys, values   [blocks, block_tokens, kv_heads, dim]
    offsets        [rows + 1] int32, where each row's queries begin
    held           [rows + 1] int32, running sum of `used`; FlashAttention 2 asks for it
    used           [rows] int32, how many keys each row has
    tables         [rows, width] int32
    max_query      most queries of a row
    max_keys       no row has more keys
    window         keys to the left and right of a query's own that it sees; -1 for all

    Returns [tokens, heads, dim].
    """
    from torch.nn.attention.varlen import varlen_attn

    # One split, always: with several, FlashAttention 2 writes wrong rows where keys are paged
    # (https://github.com/pytorch/pytorch/issues/194167), and how many it would choose depends on the batch.
    out = varlen_attn(
        query,
        keys,
        values,
        offsets,
        held,
        max_query,
        max_keys,
        scale=scale,
        window_size=window,
        enable_gqa=query.shape[1] != keys.shape[2],
        seqused_k=used,
        block_table=tables,
        num_splits=1,
    )
    assert isinstance(out, torch.Tensor)
    return out


def free_bytes(device: torch.device) -> int:
    """Return what can still be allocated, what torch holds unused included."""
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def peak_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """Return how much more memory *run* takes at its peak than was taken before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
