"""Read the text of a PTX module with one kernel, as Triton's compiler writes it (ISA, chapter 4)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_PARAMETER = re.compile(r"\.param \.\w+[^,)]*?(\w+_param_\d+)")
_THREADS = re.compile(r"\.(?:reqntid|maxntid) (\d+)")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+%(\w+)<\d+>")
_PLACE = re.compile(r"\.loc\s.*//\s*(\S+)")
_LABEL = re.compile(r"(\$\w+):")
_GUARD = re.compile(r"@(!?)(%\w+)\s+")


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction.

    opcode     its parts: ld, global, v2, b32
    operands   as written; vectors {a, b} and addresses [a+4] are one operand
    guard      the predicate register that decides which lanes execute it; empty: all do
    negated    the lanes whose guard is false do
    line       of the PTX
    place      in the source of the kernel: file.py:line:column; empty if unknown
    """

    text: str
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str
    negated: bool
    line: int
    place: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode[0]

    @property
    def kind(self) -> str:
        """The last part of the opcode, which is the type of most instructions."""
        return self.opcode[-1]

    def __str__(self) -> str:
        place = f", {self.place}" if self.place else ""
        text = self.text if len(self.text) <= 160 else f"{self.text[:157]}..."
        return f"`{text}` (line {self.line} of the PTX{place})"


@dataclass(slots=True)
class Kernel:
    """A kernel.

    parameters     names, in order
    threads        of a program
    registers      type of each family of registers: {"rd": "b64"}
    instructions   in order
    labels         which instruction follows a label
    """

    name: str
    parameters: tuple[str, ...]
    threads: int
    registers: dict[str, str]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(ptx: str) -> Kernel:
    """Read a module with one kernel."""
    entry = re.search(r"\.visible \.entry (\w+)", ptx)
    threads = _THREADS.search(ptx)
    if entry is None or threads is None:
        raise ValueError("the PTX has no kernel, or no number of threads")
    begin = ptx.index("{", threads.end())
    kernel = Kernel(
        name=entry[1],
        parameters=tuple(_PARAMETER.findall(ptx[entry.end() : begin])),
        threads=int(threads[1]),
        registers={family: kind for kind, family in _REGISTERS.findall(ptx)},
    )
    first_line = ptx.count("\n", 0, begin) + 1
    place = statement = ""
    for number, raw in enumerate(ptx[begin:].split("\n"), first_line):
        if raw == "}":
            break
        if located := _PLACE.search(raw):
            place = located[1]
        line = raw.partition("//")[0].strip()
        if number == first_line:
            line = line.removeprefix("{")
        if label := _LABEL.match(line):
            kernel.labels[label[1]] = len(kernel.instructions)
            line = line[label.end() :]
        *complete, rest = line.split(";")
        for text in complete:
            whole = f"{statement} {text}".strip(" \t{}")  # the braces of a scope
            statement = ""
            if whole and not whole.startswith("."):
                kernel.instructions.append(_instruction(whole, number, place))
        if not statement.strip() and rest.strip().startswith("."):
            continue  # a directive, which has no semicolon
        statement = f"{statement} {rest}".strip()
    return kernel


def _instruction(text: str, line: int, place: str) -> Instruction:
    guard = _GUARD.match(text)
    opcode, _, operands = " ".join(text[guard.end() if guard else 0 :].split()).partition(" ")
    return Instruction(
        text=" ".join(text.split()),
        opcode=tuple(re.split(r"(?<!:)\.", opcode)),
        operands=tuple(split_operands(operands)),
        guard=guard[2] if guard else "",
        negated=bool(guard and guard[1]),
        line=line,
        place=place,
    )


def split_operands(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    found, depth, begin = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            found.append(text[begin:at].strip())
            begin = at + 1
    last = text[begin:].strip()
    return [*found, last] if last else found


def vector(operand: str) -> list[str]:
    """Return the elements of {a, b}; an operand without braces is one element."""
    return [element.strip() for element in operand.strip("{} ").split(",")]
