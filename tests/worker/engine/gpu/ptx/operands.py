"""Operands of instructions (ISA, chapter 6): functions that read and write them, made once per kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from tests.worker.engine.gpu.ptx.errors import UnknownInstructionError, WrongAccess
from tests.worker.engine.gpu.ptx.formats import DTYPES, LANES, Lanes, Mask, unsigned
from tests.worker.engine.gpu.ptx.memory import SHARED_START, Addresses
from tests.worker.engine.gpu.ptx.parsing import Instruction
from tests.worker.engine.gpu.ptx.warps import Warp

Read: TypeAlias = Callable[[Warp], Lanes]
Write: TypeAlias = Callable[[Warp, Lanes, Mask], None]
Action: TypeAlias = Callable[[Warp, Mask], None]

_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]")

_SPECIAL: dict[str, Read] = {
    "%tid.x": lambda warp: warp.threads,
    "%tid.y": lambda warp: np.zeros(LANES, np.uint32),
    "%tid.z": lambda warp: np.zeros(LANES, np.uint32),
    "%laneid": lambda warp: warp.threads % np.uint32(LANES),
    "%ntid.x": lambda warp: np.full(LANES, warp.program.threads, np.uint32),
    **{
        f"%{name}.{letter}": lambda warp, read=read, axis=axis: np.full(  # type: ignore[misc]
            LANES, read(warp)[axis], np.uint32
        )
        for name, read in (
            ("ctaid", lambda warp: warp.program.index),
            ("nctaid", lambda warp: warp.program.grid),
        )
        for axis, letter in enumerate("xyz")
    },
}


@dataclass(frozen=True, slots=True)
class Scope:
    """Where an instruction is: its operands become functions.

    registers   type of each family of registers
    """

    instruction: Instruction
    registers: Mapping[str, str]

    def unknown(self) -> UnknownInstructionError:
        """Return the error for a form of an instruction that is not known."""
        return UnknownInstructionError(self.instruction)

    def width(self, register: str) -> int:
        """Return the bytes of a register."""
        family = register.strip("%0123456789")
        if family not in self.registers:
            raise self.unknown()
        return DTYPES[self.registers[family]].itemsize

    def read(self, operand: str, kind: str) -> Read:
        """Return what reads a register, a special register or a constant as numbers of a type."""
        dtype = DTYPES[kind]
        if (special := _SPECIAL.get(operand)) is not None:
            return lambda warp: special(warp).astype(unsigned(dtype.itemsize)).view(dtype)
        if operand.startswith("%"):
            width = self.width(operand)
            if width == dtype.itemsize:
                return lambda warp: warp.registers[operand].view(dtype)
            if width < dtype.itemsize:
                raise self.unknown()
            narrow = unsigned(dtype.itemsize)
            return lambda warp: warp.registers[operand].astype(narrow).view(dtype)
        constant = self._constant(operand, dtype)
        return lambda warp: constant

    def _constant(self, operand: str, dtype: np.dtype[np.generic]) -> Lanes:
        bits = unsigned(dtype.itemsize)
        if re.fullmatch(r"0[fFdD][0-9A-Fa-f]+", operand):
            value = int(operand[2:], 16)
        elif operand == "global_smem":
            value = SHARED_START
        else:
            try:
                value = int(operand.removesuffix("U"), 0)
            except ValueError:
                raise self.unknown() from None
        if dtype == np.bool_:
            return np.full(LANES, value != 0)
        return np.full(LANES, value % (1 << (8 * dtype.itemsize)), bits).view(dtype)

    def write(self, register: str) -> Write:
        """Return what writes a register. Shorter signed numbers are extended by their sign, others by 0."""
        if register == "_":
            return lambda warp, values, mask: None
        bits = unsigned(self.width(register))
        logical = self.registers[register.strip("%0123456789")] == "pred"

        def put(warp: Warp, values: Lanes, mask: Mask) -> None:
            if not logical:
                if values.itemsize == bits.itemsize:
                    values = values.view(bits)
                elif values.dtype.kind == "i":
                    values = values.astype(bits)
                else:
                    values = values.view(unsigned(values.itemsize)).astype(bits)
            if mask is not None:
                values = np.where(mask, values, warp.registers[register])
            warp.registers[register] = values

        return put

    def address(self, operand: str) -> Callable[[Warp], Addresses]:
        """Return what computes an address such as [%rd1 + 4] in each lane."""
        match = _ADDRESS.fullmatch(operand)
        if match is None:
            raise self.unknown()
        base, offset = match[1], int(match[2] or 0)
        if not base.startswith("%"):
            fixed = self._constant(base, np.dtype(np.int64)) + offset
            return lambda warp: fixed
        return lambda warp: warp.registers[base].astype(np.int64) + offset

    def number(self, operand: str) -> int:
        """Return a constant that is part of an instruction."""
        try:
            return int(operand, 0)
        except ValueError:
            raise self.unknown() from None


def all_lanes(mask: Mask) -> None:
    """Raise if a lane does not execute an instruction that needs all of them."""
    if mask is not None and not mask.all():
        raise WrongAccess(f"only {int(mask.sum())} of {LANES} lanes execute it")
