"""Keep a worker to some of the machine's CPUs.

A model on the CPU runs as fast as memory feeds it. On a machine with several NUMA nodes a worker that
wanders between them reads half of its weights through the other node: one worker per node, each kept to
its own CPUs, has its memory beside it, since Linux takes pages from the node of whoever touches them
first. On a small machine the same setting keeps workers from fighting for cores.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_NODES = Path("/sys/devices/system/node")


def parse(text: str, nodes: Path = _NODES) -> frozenset[int]:
    """Turn a setting into numbers of CPUs.

    text    "0-7,16" as Linux writes lists of CPUs, or "node0" for the CPUs of a NUMA node; empty for none
            in particular
    nodes   where the system describes its nodes

    Raises ValueError for anything else, and for a node that is not there.
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


def keep_to(cpus: frozenset[int]) -> None:
    """Run this thread, and all that it will start, on these CPUs only; an empty set changes nothing.

    Raises OSError when none of them may be used here, and NotImplementedError where the system cannot.
    """
    if not cpus:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise NotImplementedError("this system does not keep processes to CPUs; leave HEADRACE_CPUS out")
    os.sched_setaffinity(0, cpus)
