"""Run a kernel: all programs of a grid, and the warps of each from barrier to barrier, in random order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

import numpy as np

from tests.worker.engine.gpu.ptx import arithmetic, exchanges, matrices, transfers
from tests.worker.engine.gpu.ptx.errors import EmulationError, UnknownInstructionError, WrongAccess
from tests.worker.engine.gpu.ptx.formats import LANES, Mask
from tests.worker.engine.gpu.ptx.memory import Memory, shared_memory
from tests.worker.engine.gpu.ptx.operands import Action, Scope
from tests.worker.engine.gpu.ptx.parsing import Instruction, parse
from tests.worker.engine.gpu.ptx.warps import Program, Warp

_BUILDERS = {**arithmetic.BUILDERS, **transfers.BUILDERS, **exchanges.BUILDERS, **matrices.BUILDERS}


@dataclass(frozen=True, slots=True)
class Step:
    """What an instruction does: it computes, branches, waits at a barrier, or ends the lanes.

    action   of an instruction that computes; else None
    target   of a branch, or one past the last instruction to end; else -1: a barrier
    """

    instruction: Instruction
    action: Action | None
    target: int = -1


class Emulated:
    """A kernel that can be run.

    shared_bytes   of shared memory of a program

    Raises `UnknownInstructionError` if it has an instruction that the emulator does not know.
    """

    def __init__(self, ptx: str, shared_bytes: int) -> None:
        self.kernel = parse(ptx)
        self._shared_bytes = shared_bytes
        self._steps = [self._step(instruction) for instruction in self.kernel.instructions]

    def _step(self, instruction: Instruction) -> Step:
        opcode = instruction.opcode
        if opcode in (("bra",), ("bra", "uni")):
            return Step(instruction, None, self.kernel.labels[instruction.operands[0]])
        if opcode == ("ret",):
            return Step(instruction, None, len(self.kernel.instructions))
        if opcode == ("bar", "sync") and instruction.operands == ("0",) and not instruction.guard:
            return Step(instruction, None)
        build = _BUILDERS.get(instruction.name)
        if build is None:
            raise UnknownInstructionError(instruction)
        try:
            return Step(instruction, build(Scope(instruction, self.kernel.registers)))
        except (KeyError, ValueError, IndexError) as error:  # a form that its builder did not expect
            raise UnknownInstructionError(instruction) from error

    def run(
        self, grid: Sequence[int], parameters: Mapping[str, int], tensors: Memory, random: Random
    ) -> None:
        """Run all programs of a grid, one after the other.

        Raises `EmulationError` if one does what it may not.
        """
        x, y, z = (*grid, 1, 1)[:3]
        programs = list(product(range(x), range(y), range(z)))
        random.shuffle(programs)
        with np.errstate(all="ignore"):  # overflows and operations on NaN are part of the arithmetic
            for index in programs:
                shared = shared_memory(random.randbytes(self._shared_bytes))
                self._run_program(
                    Program(index, (x, y, z), self.kernel.threads, parameters, tensors, shared, random)
                )

    def _run_program(self, program: Program) -> None:
        warps = [Warp(program, number, self.kernel.registers) for number in range(program.threads // LANES)]
        while warps:
            program.random.shuffle(warps)
            at = {warp.number: self._run_warp(warp) for warp in warps}
            if len(set(at.values())) > 1:
                places = {
                    number: str(self._steps[step].instruction) if step < len(self._steps) else "its end"
                    for number, step in sorted(at.items())
                }
                raise EmulationError(f"{self._named(program)}: warps wait at different places: {places}")
            if at[0] == len(self._steps):
                return

    def _named(self, program: Program) -> str:
        return f"{self.kernel.name}, program {program.index} of {program.grid}"

    def _run_warp(self, warp: Warp) -> int:
        """Run to the next barrier or the end; return which step it is."""
        steps, at = self._steps, int(warp.next[0])
        mask: Mask = None
        while True:
            if mask is not None:
                # Lanes that have taken different branches: those that are furthest behind go on.
                at = int(warp.next.min())
                mask = warp.next == at
                if mask.all():
                    mask = None
            if at == len(steps):
                warp.next[:] = at
                return at
            step = steps[at]
            instruction = step.instruction
            active: Mask = mask
            if instruction.guard:
                own = warp.registers[instruction.guard]
                if instruction.negated:
                    own = ~own
                active = own if mask is None else own & mask
                if active.all():
                    active = None
            if step.action is not None:
                self._act(step.action, instruction, warp, active)
                at += 1
                if mask is not None:
                    warp.next[mask] = at
            elif step.target < 0:
                if mask is not None:
                    raise self._wrong(instruction, warp, WrongAccess("not all lanes arrive at the barrier"))
                warp.next[:] = at + 1
                return at
            elif active is None:
                at = step.target
            elif mask is None and not active.any():
                at += 1
            else:
                if mask is None:
                    mask = np.ones(LANES, bool)
                warp.next[mask] = at + 1
                warp.next[active] = step.target

    def _act(self, action: Action, instruction: Instruction, warp: Warp, active: Mask) -> None:
        try:
            action(warp, active)
        except Exception as error:  # whatever it is, the place is worth knowing
            raise self._wrong(instruction, warp, error) from error

    def _wrong(self, instruction: Instruction, warp: Warp, error: Exception) -> EmulationError:
        reason = str(error) if isinstance(error, WrongAccess) else repr(error)
        return EmulationError(f"{self._named(warp.program)}, warp {warp.number}: {instruction}: {reason}")
