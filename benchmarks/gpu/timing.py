"""Time work of a device: as a CUDA graph, so that the time to launch it does not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


def seconds_of(work: Callable[[], object], device: torch.device, *, budget: float = 0.5) -> float:
    """Return the median time of one call.

    work      can be captured as a CUDA graph: no allocation that matters, no synchronisation
    budget    about how many seconds to measure
    """
    if device.type != "cuda":
        return _timed(work)
    for _ in range(2):  # compiles and tunes
        work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return _replayed(graph, device, budget)


def seconds_of_launches(work: Callable[[], object], device: torch.device, *, budget: float = 0.5) -> float:
    """Return the median time of one call that cannot be captured; the time to launch it counts."""
    if device.type != "cuda":
        return _timed(work)
    for _ in range(2):
        work()
    return _between_events(work, device, budget)


def _replayed(graph: torch.cuda.CUDAGraph, device: torch.device, budget: float) -> float:
    seconds = _between_events(graph.replay, device, budget)
    graph.reset()
    return seconds


def _between_events(work: Callable[[], object], device: torch.device, budget: float) -> float:
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    once = max(time.perf_counter() - began, 1e-5)
    calls = max(min(int(budget / once), 100), 5)
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
