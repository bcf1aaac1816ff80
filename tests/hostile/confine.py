"""Limit a running process to the memory of its manifest: by a cgroup if possible, else by rlimit."""

from __future__ import annotations

import os
import re
import resource
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from tests.faults.fleet import Child

BASE = Path(__file__).parent.parent.parent / "k8s" / "base"
CGROUP = Path("/sys/fs/cgroup")
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def manifest_limit(service: str) -> int:
    """Return the memory limit in bytes of a pod of *service*; of a tier, that of the base."""
    (file,) = BASE.rglob(f"{service}.yaml")
    (found,) = (each for each in yaml.safe_load_all(file.read_text()) if each["kind"] == "Deployment")
    (container,) = found["spec"]["template"]["spec"]["containers"]
    return parsed(container["resources"]["limits"]["memory"])


def parsed(quantity: str) -> int:
    """Return a Kubernetes quantity of memory in bytes."""
    match = re.fullmatch(r"(\d+)(Ki|Mi|Gi)", quantity)
    assert match, quantity
    return int(match[1]) * UNITS[match[2]]


@contextmanager
def confined(child: Child, limit: int) -> Iterator[str]:
    """Limit the running *child* to *limit* bytes of memory while the block runs. Yields the means.

    Memory that it has already remains charged to its former group, so that its new group gets the rest.
    """
    rest = limit - child.memory
    assert rest > 0, f"{child.name} has {child.memory} bytes before the test"
    v2 = (CGROUP / "cgroup.controllers").exists()
    group = (CGROUP if v2 else CGROUP / "memory") / f"headrace-{uuid.uuid4().hex[:8]}"
    before = _group_of(child.pid, v2)
    try:
        group.mkdir()
        (group / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(rest))
        (group / "cgroup.procs").write_text(str(child.pid))
    except OSError:
        with suppress(OSError):
            group.rmdir()
        # RLIMIT_DATA counts writable address space, used or not, and so is stricter.
        data = next(
            int(line.split()[1]) * 1024
            for line in Path(f"/proc/{child.pid}/status").read_text().splitlines()
            if line.startswith("VmData")
        )
        resource.prlimit(child.pid, resource.RLIMIT_DATA, (data + rest, data + rest))
        yield "RLIMIT_DATA"
        return
    try:
        yield f"cgroup v{2 if v2 else 1}"
    finally:
        with suppress(OSError):
            if child.alive:
                (before / "cgroup.procs").write_text(str(child.pid))
        with suppress(OSError):
            group.rmdir()


def _group_of(pid: int, v2: bool) -> Path:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if (v2 and not controllers) or "memory" in controllers.split(","):
            return (CGROUP if v2 else CGROUP / "memory") / path.lstrip("/")
    return Path(os.devnull)
