"""What the emulator raises."""

from __future__ import annotations


class EmulationError(Exception):
    """A kernel did what no program may do. The message names the program, the warp and the instruction."""


class UnknownInstructionError(Exception):
    """The emulator does not know an instruction or one of its forms: add it to the module of its kind."""

    def __init__(self, instruction: object) -> None:
        super().__init__(f"the emulator does not know {instruction}")


class WrongAccess(Exception):
    """An instruction addresses memory that it may not, or is executed by too few lanes.

    Becomes an `EmulationError`.
    """
