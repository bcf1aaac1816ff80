"""Bind a worker to some of the machine's CPUs.

A model on the CPU is limited by memory bandwidth. On a machine with several NUMA nodes, a worker that
migrates between them reads half of its weights from the remote node. Run one worker per node, each bound to
its node's CPUs: its memory is then local, because Linux allocates a page on the node of the thread that
touches it first. On a small machine the same setting keeps workers from competing for cores.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_NODES = Path("/sys/devices/system/node")


def parse(text: str, nodes: Path = _NODES) -> frozenset[int]:
    """Parse a setting into CPU numbers.

    text    "0-7,16" as Linux writes lists of CPUs, or "node0" for the CPUs of a NUMA node; empty for no
            binding
    nodes   where the system describes its nodes

    Raises ValueError for anything else, and for a node that does not exist.
    """
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        if re.fullmatch(r"node\d+", part):
            try:
                found |= parse((nodes / part / "cpulist").read_text().strip())
            except OSError:
                raise ValueError(f"there is no NUMA {part} on this machine") from None
            continue
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(
                f"{part!r} is not a CPU, a range of CPUs such as 0-7, or a NUMA node such as node0"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {part} ends before it begins")
        found |= set(range(first, last + 1))
    return frozenset(found)


def bind(cpus: frozenset[int]) -> None:
    """Run this thread, and all threads that it starts, on these CPUs only; an empty set changes nothing.

    Raises OSError if none of them is available, and NotImplementedError if the system does not support it.
    """
    if not cpus:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise NotImplementedError("this system cannot bind processes to CPUs; unset HEADRACE_CPUS")
    os.sched_setaffinity(0, cpus)
