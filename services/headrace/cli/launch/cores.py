"""Decide what the cores of this machine are used for: threads of the models, or processes of the mesh.

A process of a gateway, router or batcher uses up to one core. Several of them help if a mesh has many
requests and the models leave cores for them: an accelerator computes them, or nothing does (`--fake`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# A request of 16 tokens costs a worker 0.6 ms of CPU time, a router or a batcher 1.0 ms. Connections spread
# unevenly over processes, so it takes more of these to fill the one worker of a tier.
MOST_PROCESSES = 4


def cores() -> int:
    """Return the number of cores that this process may use, within its CPU quota."""
    if sys.platform == "linux":
        return max(1, min(len(os.sched_getaffinity(0)), quota()))
    return os.cpu_count() or 1


def quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the smallest CPU quota of the control groups of this process, of version 2, in whole cores.

    root   mount point of control groups; in a container, the group of the container
    own    names the group of the process, in the line 0::NAME
    """
    try:
        name = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return sys.maxsize
    group = root / name.lstrip("/")
    least = sys.maxsize
    # In a container, the name may be that of the host, which does not exist below the root.
    for folder in {root, group, *(parent for parent in group.parents if parent.is_relative_to(root))}:
        try:
            allowed, period = (folder / "cpu.max").read_text().split()
        except OSError:
            continue
        if allowed != "max":
            least = min(least, int(allowed) // int(period))
    return least


def worker_threads(cores: int, tiers: int) -> int:
    """Return the threads of each tier's worker: an equal share of the cores, at least one."""
    return max(1, cores // tiers)


def parallel_processes(cores: int, tiers: int, *, threads: int, edges: int = 1) -> int:
    """Return how many processes each edge has, and how many batchers each tier has: at least one.

    They share the cores that the workers leave. All may be busy at the same time.

    threads   busy threads of each worker
    edges     services that callers call: the router, and a gateway
    """
    free = cores - tiers * threads
    return min(max(1, free // (edges + tiers)), MOST_PROCESSES)
