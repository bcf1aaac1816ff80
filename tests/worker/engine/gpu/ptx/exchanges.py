"""Instructions among the lanes of a warp: shfl, vote and redux (ISA, section 9.7), and fences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.worker.engine.gpu.ptx.errors import WrongAccess
from tests.worker.engine.gpu.ptx.formats import LANES, Lanes, Mask
from tests.worker.engine.gpu.ptx.operands import Action, Scope, all_lanes
from tests.worker.engine.gpu.ptx.warps import Warp

_LANES = np.arange(LANES)


def _every_lane(scope: Scope) -> Action:
    """Return what checks that all lanes execute an instruction, and are named by its last operand."""
    operand = scope.instruction.operands[-1]
    if operand == "-1":
        return lambda warp, mask: all_lanes(mask)
    named = scope.read(operand, "u32")

    def check(warp: Warp, mask: Mask) -> None:
        all_lanes(mask)
        if (lanes := named(warp)).min() != (1 << LANES) - 1:
            raise WrongAccess(f"its mask of lanes is {int(lanes.min()):#x}, not all of them")

    return check


def _shuffle(scope: Scope) -> Action:
    _, sync, mode, _ = scope.instruction.opcode
    target, source, distance, clamp, _ = scope.instruction.operands
    if sync != "sync" or mode not in ("bfly", "up", "down", "idx") or "|" in target:
        raise scope.unknown()
    check = _every_lane(scope)
    read, by, write = scope.read(source, "b32"), scope.read(distance, "b32"), scope.write(target)
    limit, segment = scope.number(clamp) & 31, scope.number(clamp) >> 8 & 31
    most = (_LANES & segment) | (limit & ~segment)

    def act(warp: Warp, mask: Mask) -> None:
        check(warp, mask)
        other = (by(warp) & np.uint32(31)).astype(np.int64)
        if mode == "up":
            lane = _LANES - other
            inside = lane >= most
        else:
            lane = {
                "down": _LANES + other,
                "bfly": _LANES ^ other,
                "idx": (_LANES & segment) | (other & ~segment),
            }[mode]
            inside = lane <= most
        write(warp, read(warp)[np.where(inside, lane, _LANES)], mask)

    return act


def _vote(scope: Scope) -> Action:
    if scope.instruction.opcode != ("vote", "sync", "ballot", "b32"):
        raise scope.unknown()
    check = _every_lane(scope)
    target, source, _ = scope.instruction.operands
    read, write = scope.read(source, "pred"), scope.write(target)

    def act(warp: Warp, mask: Mask) -> None:
        check(warp, mask)
        write(warp, np.full(LANES, np.packbits(read(warp), bitorder="little").view(np.uint32)[0]), mask)

    return act


_REDUCTIONS: dict[str, Callable[[Lanes], Any]] = {
    "add": lambda numbers: numbers.sum(dtype=numbers.dtype),
    "min": np.min,
    "max": np.max,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


def _reduce(scope: Scope) -> Action:
    _, _, operation, kind = scope.instruction.opcode
    if operation not in _REDUCTIONS:
        raise scope.unknown()
    check = _every_lane(scope)
    target, source, _ = scope.instruction.operands
    read, write, reduced = scope.read(source, kind), scope.write(target), _REDUCTIONS[operation]

    def act(warp: Warp, mask: Mask) -> None:
        check(warp, mask)
        numbers = read(warp)
        write(warp, np.full(LANES, reduced(numbers), numbers.dtype), mask)

    return act


def _no_effect(scope: Scope) -> Action:
    """Build a fence: what a lane writes is visible at once here."""
    return lambda warp, mask: None


def _synchronise_warp(scope: Scope) -> Action:
    """Build bar.warp.sync: the lanes of a warp are at the same instruction anyway, if all execute it."""
    if scope.instruction.opcode != ("bar", "warp", "sync"):
        raise scope.unknown()
    return _every_lane(scope)


BUILDERS: dict[str, Callable[[Scope], Action]] = {
    "shfl": _shuffle,
    "vote": _vote,
    "redux": _reduce,
    "fence": _no_effect,
    "membar": _no_effect,
    "bar": _synchronise_warp,
}
