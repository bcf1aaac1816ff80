"""How much KV memory there can be: measured once the model is loaded, before the worker is ready.

A step as large as steps get runs over a memory of a few blocks, which shows what activations, logits and
sampling take at their peak. What is free beyond that peak is shared out in blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from headrace.worker.engine.gpu import cuda
from headrace.worker.engine.interface import Row, SamplingParams
from headrace.worker.engine.load.refusals import LoadingError

# The share of what is free that KV memory takes. On the CPU it is meant to leave room for the other workers
# of a machine, whose memory, promised but not yet written to, counts as free.
SHARES = {"cpu": 0.25, "cuda": 0.9}

_PARAMS = SamplingParams(
    seed=1, max_tokens=1, temperature=1.0, top_p=0.9, frequency_penalty=0.1, logprobs=True, ignore_eos=True
)


def largest_step(*, step_tokens: int, max_running: int, context_length: int, block_tokens: int) -> list[Row]:
    """Make rows that take as much memory as any step may: all sequences sample, one is a long chunk.

    All sequences are at the end of their context. Each lives in blocks 0 and 1 alone, over and over: what
    they compute is nonsense, and takes as much memory as sense would.
    """
    needed = -(-context_length // block_tokens)
    ids = [0] * context_length
    chunk = min(max(step_tokens - max_running + 1, 1), context_length)
    return [
        Row(
            # The long chunk writes block 0, the others block 1.
            blocks=[min(index, 1)] * needed,
            start=context_length - (1 if index else chunk),
            stop=context_length,
            ids=ids,
            prompt=context_length - 1,
            sample=True,
            params=_PARAMS,
        )
        for index in range(max_running)
    ]


def choose_blocks(
    *, free: int, peak: int, share: float, block: int, fewest: int, most: int, asked: int | None = None
) -> int:
    """Decide how many blocks of KV memory to have.

    free     bytes that can be allocated
    peak     bytes that a step takes at its peak
    share    of what is left of them, for KV memory
    block    bytes of one block in all layers
    fewest   blocks for one sequence of the whole context
    most     blocks for as many of them as may run: more would never be used
    asked    bytes of KV memory by setting; None to take *share*

    Raises LoadingError when not even one sequence fits, or more is asked for than there is.
    """
    left = max(free - peak, 0)
    if asked is not None and asked > left:
        raise LoadingError(
            f"{asked / 2**30:.1f} GiB of KV memory were asked for, and {left / 2**30:.1f} GiB are free "
            f"beside the model and its steps; ask for less"
        )
    blocks = (int(left * share) if asked is None else asked) // block
    if blocks < fewest:
        raise LoadingError(
            f"one sequence of the whole context takes {fewest * block / 2**20:.0f} MiB of KV memory, and "
            f"there are {blocks * block / 2**20:.0f} MiB ({free / 2**20:.0f} MiB free, of which a step takes "
            f"{peak / 2**20:.0f}); ask for a shorter context or give it more memory"
        )
    return min(blocks, most) if asked is None else blocks


def free_bytes(device: torch.device) -> int:
    """Return what can still be allocated on the device; on the CPU within the limits of its cgroups."""
    return cuda.free_bytes(device) if device.type == "cuda" else min(free_in_cgroups(), _free_in_system())


def peak_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """Run something, and return how much more memory it takes at its peak than was taken before."""
    if device.type == "cuda":
        return cuda.peak_bytes(device, run)
    # Sets VmHWM back to what is resident now. Where that is forbidden, the peak is that of loading: too
    # much, on the safe side.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    """Read a line of /proc/self/status, in bytes; 0 where there is none."""
    return _kibibytes(Path("/proc/self/status"), name)


def _kibibytes(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _free_in_system() -> int:
    free = _kibibytes(Path("/proc/meminfo"), "MemAvailable")
    # Elsewhere than on Linux nobody tells; lazily committed memory can afford a guess.
    return free or 8 << 30


@dataclass(frozen=True, slots=True)
class _Version:
    """How one version of control groups names what it knows of memory, in files of each group's folder.

    limits   bytes that the group may take; a group has the least of them
    used     bytes that it takes
    unused   name in memory.stat of pages of files that were not touched lately, which are freed first
    """

    limits: tuple[str, ...]
    used: str
    unused: str


# At memory.high a group is slowed down until it crawls, at memory.max it is killed.
_V2 = _Version(("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1 = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_UNLIMITED = 1 << 62  # bytes; version 1 writes almost 2**63 for no limit


def free_in_cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return what the tightest of the process's control groups still allows, of version 1 and 2.

    root   where control groups are mounted; those of version 1 that limit memory at root/memory
    own    names the process's groups: a line HIERARCHY:CONTROLLERS:NAME each

    A group's limit holds for all groups inside it, so those around the process's own count too.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return _UNLIMITED
    free = _UNLIMITED
    for _, controllers, name in (line for line in lines if len(line) == 3):
        if not controllers:
            free = min(free, _free_around(root, name, _V2))
        elif "memory" in controllers.split(","):
            free = min(free, _free_around(root / "memory", name, _V1))
    return free


def _free_around(root: Path, name: str, version: _Version) -> int:
    """Return what a group and all around it still allow."""
    group = root / name.lstrip("/")
    # In a container the name may be the host's, while the container's own group is mounted as the root.
    inside = (root,) if ".." in group.parts else (group, *group.parents)
    folders = [folder for folder in inside if folder.is_relative_to(root)]
    return min((_free_in(folder, version) for folder in folders), default=_UNLIMITED)


def _free_in(folder: Path, version: _Version) -> int:
    limits = [limit for name in version.limits if (limit := _number(folder / name)) is not None]
    used = _number(folder / version.used)
    if not limits or used is None:
        return _UNLIMITED
    unused = 0
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        unused = next((int(words[1]) for words in lines if words[0] == version.unused), 0)
    return min(max(min(limits) - used + unused, 0), _UNLIMITED)


def _number(path: Path) -> int | None:
    """Read a number; None where there is none, or the word "max"."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None
