"""The state of a warp: registers, and asynchronous operations in flight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import numpy as np

from tests.worker.engine.gpu.ptx.formats import DTYPES, LANES, Lanes
from tests.worker.engine.gpu.ptx.memory import Memory


class Pending:
    """Asynchronous operations of a warp, in groups (ISA, "cp.async.commit_group", "wgmma.wait_group").

    An operation takes effect at its issue or when its group is waited for, by chance: the two ends of the
    time in which a GPU may execute it.

    ordered   an operation needs the results of those before it
    """

    def __init__(self, random: Random, *, ordered: bool) -> None:
        self._random, self._ordered = random, ordered
        self._open: list[Callable[[], None]] = []
        self._groups: list[list[Callable[[], None]]] = []

    def add(self, operation: Callable[[], None]) -> None:
        """Issue an operation, which must not fail."""
        self._open.append(operation)
        if self._random.random() < 0.5:
            if self._ordered:
                self.wait(0)
                self._complete(self._open)
            else:
                self._open.pop()()

    def commit(self) -> None:
        """End a group."""
        self._groups.append(self._open)
        self._open = []

    def wait(self, allowed: int) -> None:
        """Complete all groups but the latest *allowed*."""
        for group in self._groups[: max(len(self._groups) - allowed, 0)]:
            self._complete(group)
        del self._groups[: max(len(self._groups) - allowed, 0)]

    @staticmethod
    def _complete(group: list[Callable[[], None]]) -> None:
        for operation in group:
            operation()
        group.clear()


class Registers(dict[str, Lanes]):
    """Registers by name. All bits of those that were never written are 1: NaN and large numbers."""

    def __init__(self, families: Mapping[str, str]) -> None:
        self._families = families

    def __missing__(self, name: str) -> Lanes:
        dtype = DTYPES[self._families[name.strip("%0123456789")]]
        self[name] = empty = np.zeros(LANES, dtype) if dtype == np.bool_ else ~np.zeros(LANES, dtype)
        return empty


@dataclass(frozen=True, slots=True)
class Program:
    """A program of a launch, which CUDA calls a CTA.

    index        in the grid
    grid         number of programs in each dimension
    threads      of a program
    parameters   bits of the kernel's parameters
    tensors      global memory
    """

    index: tuple[int, int, int]
    grid: tuple[int, int, int]
    threads: int
    parameters: Mapping[str, int]
    tensors: Memory
    shared: Memory
    random: Random


class Warp:
    """A warp of a program. Arrays in its registers are never modified, only replaced."""

    def __init__(self, program: Program, number: int, families: Mapping[str, str]) -> None:
        self.program, self.number = program, number
        self.threads = np.arange(number * LANES, (number + 1) * LANES, dtype=np.uint32)
        self.registers = Registers(families)
        self.copies = Pending(program.random, ordered=False)
        self.products = Pending(program.random, ordered=True)
        self.next = np.zeros(LANES, np.int64)  # the next instruction of each lane
