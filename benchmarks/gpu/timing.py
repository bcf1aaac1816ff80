"""Time work of a device: as a CUDA graph, so that the time to launch it does not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

_GRAPH_SECONDS = 1e-3


def seconds_of(work: Callable[[], object], device: torch.device, *, budget: float = 0.5) -> float:
    """Return the median time of one call.

    work      can be captured as a CUDA graph: no allocation that matters, no synchronisation
    budget    about how many seconds to measure
    """
    if device.type != "cuda":
        return _timed(work)
    for _ in range(2):  # compiles and tunes
        work()
    # Several calls in a graph if they are short, because a replay takes some microseconds by itself.
    calls = max(min(int(_GRAPH_SECONDS / _once(work, device)), 50), 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    seconds = _between_events(graph.replay, device, budget) / calls
    graph.reset()
    return seconds


def seconds_of_launches(work: Callable[[], object], device: torch.device, *, budget: float = 0.5) -> float:
    """Return the median time of one call that cannot be captured; the time to launch it counts."""
    if device.type != "cuda":
        return _timed(work)
    for _ in range(2):
        work()
    return _between_events(work, device, budget)


def _once(work: Callable[[], object], device: torch.device) -> float:
    """Return about how long a call takes, launches included."""
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return max(time.perf_counter() - began, 1e-5)


def _between_events(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """Return the median time between the ends of two calls."""
    calls = max(min(int(budget / _once(work, device)), 100), 5)
    event: Any = torch.cuda.Event
    marks = [event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize(device)
    spans = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    return float(statistics.median(spans))


def _timed(work: Callable[[], object]) -> float:
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
