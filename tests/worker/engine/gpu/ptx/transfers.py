"""Instructions that read and write memory (ISA, "Data Movement and Conversion Instructions", and "atom")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.worker.engine.gpu.ptx.errors import WrongAccess
from tests.worker.engine.gpu.ptx.formats import DTYPES, LANES, Lanes, Mask
from tests.worker.engine.gpu.ptx.memory import Memory
from tests.worker.engine.gpu.ptx.operands import Action, Scope
from tests.worker.engine.gpu.ptx.parsing import vector
from tests.worker.engine.gpu.ptx.warps import Warp

_VECTORS = {"v2": 2, "v4": 4}


def memory_named(scope: Scope, space: str) -> Callable[[Warp], Memory]:
    """Return what finds the memory of a state space."""
    if space == "global":
        return lambda warp: warp.program.tensors
    if space in ("shared", "shared::cta"):
        return lambda warp: warp.program.shared
    raise scope.unknown()


def _load(scope: Scope) -> Action:
    _, space, *modifiers, kind = scope.instruction.opcode
    target, source = scope.instruction.operands
    if space == "param":
        return _load_parameter(scope, target, source.strip("[] "), kind)
    count = _numbers(scope, modifiers)
    memory, address, dtype = memory_named(scope, space), scope.address(source), DTYPES[kind]
    writes = [scope.write(name) for name in vector(target)]
    if len(writes) != count:
        raise scope.unknown()

    def act(warp: Warp, mask: Mask) -> None:
        if mask is None:
            found = memory(warp).read(address(warp), dtype, count)
        elif mask.any():
            found = np.zeros((LANES, count), dtype)
            found[mask] = memory(warp).read(address(warp)[mask], dtype, count)
        else:
            return
        for index, write in enumerate(writes):
            write(warp, found[:, index].copy(), mask)

    return act


def _numbers(scope: Scope, modifiers: list[str]) -> int:
    """Return how many numbers a lane accesses at once. Hints to caches have no effect."""
    counts = [_VECTORS[modifier] for modifier in modifiers if modifier in _VECTORS]
    if set(modifiers) - set(_VECTORS) - {"relaxed", "gpu", "ca", "cg", "volatile"} or len(counts) > 1:
        raise scope.unknown()
    return counts[0] if counts else 1


def _load_parameter(scope: Scope, target: str, name: str, kind: str) -> Action:
    write, dtype = scope.write(target), DTYPES[kind]

    def act(warp: Warp, mask: Mask) -> None:
        bits = warp.program.parameters[name] % (1 << (8 * dtype.itemsize))
        write(warp, np.full(LANES, bits, f"u{dtype.itemsize}").view(dtype), mask)

    return act


def _store(scope: Scope) -> Action:
    _, space, *modifiers, kind = scope.instruction.opcode
    target, source = scope.instruction.operands
    count = _numbers(scope, modifiers)
    memory, address = memory_named(scope, space), scope.address(target)
    reads = [scope.read(name, kind) for name in vector(source)]
    if len(reads) != count:
        raise scope.unknown()

    def act(warp: Warp, mask: Mask) -> None:
        where, values = address(warp), np.stack([read(warp) for read in reads], axis=1)
        if mask is None:
            memory(warp).write(where, values)
        elif mask.any():
            memory(warp).write(where[mask], values[mask])

    return act


_ATOMIC: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}


def _atomic(scope: Scope) -> Action:
    """Build atom: the lanes of a warp modify memory one after the other, in any order."""
    _, space, *modifiers, operation, kind = scope.instruction.opcode
    target, where, source = scope.instruction.operands
    if operation not in _ATOMIC or set(modifiers) - {"relaxed", "acq_rel", "gpu", "cta"}:
        raise scope.unknown()
    memory, address, combine = memory_named(scope, space), scope.address(where), _ATOMIC[operation]
    read, write, dtype = scope.read(source, kind), scope.write(target), DTYPES[kind]

    def act(warp: Warp, mask: Mask) -> None:
        lanes = list(range(LANES)) if mask is None else np.flatnonzero(mask).tolist()
        warp.program.random.shuffle(lanes)
        places, values, old = address(warp), read(warp), np.zeros(LANES, dtype)
        for lane in lanes:
            at = places[lane : lane + 1]
            old[lane : lane + 1] = memory(warp).read(at, dtype)[:, 0]
            memory(warp).write(at, combine(old[lane : lane + 1], values[lane : lane + 1])[:, None])
        write(warp, old, mask)

    return act


def _copy(scope: Scope) -> Action:
    """Build cp.async, its groups and its waits."""
    opcode, operands = scope.instruction.opcode, scope.instruction.operands
    if opcode == ("cp", "async", "commit_group"):
        return lambda warp, mask: warp.copies.commit()
    if opcode == ("cp", "async", "wait_group"):
        allowed = scope.number(operands[0])
        return lambda warp, mask: warp.copies.wait(allowed)
    if opcode not in (("cp", "async", "ca", "shared", "global"), ("cp", "async", "cg", "shared", "global")):
        raise scope.unknown()
    target, source, size = scope.address(operands[0]), scope.address(operands[1]), scope.number(operands[2])
    given = scope.read(operands[3], "u32") if len(operands) > 3 else None

    def act(warp: Warp, mask: Mask) -> None:
        chosen = np.ones(LANES, bool) if mask is None else mask
        if not chosen.any():
            return
        to, begin = target(warp)[chosen], source(warp)[chosen]
        read = np.full(LANES, size) if given is None else given(warp)
        read = read[chosen]
        if not np.isin(read, (0, size)).all():
            raise WrongAccess("it reads a part of its bytes, which Triton does not use")
        present = read != 0
        warp.program.shared.check(to, size)
        if present.any():
            warp.program.tensors.check(begin[present], size)

        def copy() -> None:
            values = np.zeros((len(to), size), np.uint8)
            if present.any():
                values[present] = warp.program.tensors.read(begin[present], values.dtype, size)
            warp.program.shared.write(to, values)

        warp.copies.add(copy)

    return act


BUILDERS: dict[str, Callable[[Scope], Action]] = {
    "ld": _load,
    "st": _store,
    "atom": _atomic,
    "cp": _copy,
}
