"""Instructions that compute in each lane alone (ISA, sections 9.7.1 to 9.7.9 without memory).

What the ISA calls approximate is computed exactly and rounded; a GPU may differ in the last bits. A sum of
float32 that is fused with a product is rounded twice, first to float64, which rarely changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.worker.engine.gpu.ptx.formats import (
    DTYPES,
    LANES,
    Lanes,
    Mask,
    flushed,
    narrowed,
    unsigned,
    widened,
)
from tests.worker.engine.gpu.ptx.operands import Action, Scope
from tests.worker.engine.gpu.ptx.parsing import vector
from tests.worker.engine.gpu.ptx.warps import Warp

_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
_HALVES = {"f16", "bf16", "f16x2", "bf16x2"}


def elementwise(scope: Scope, kinds: Sequence[str], compute: Callable[..., Lanes]) -> Action:
    """Return an action that writes what *compute* returns for sources of these types."""
    target, *sources = scope.instruction.operands
    if len(sources) != len(kinds):
        raise scope.unknown()
    reads = [scope.read(source, kind) for source, kind in zip(sources, kinds, strict=True)]
    write = scope.write(target)

    def act(warp: Warp, mask: Mask) -> None:
        write(warp, compute(*[read(warp) for read in reads]), mask)

    return act


# By name: the number of sources, and what is computed. Of float16 and bfloat16, on float32.
_FLOATS: dict[str, tuple[int, Callable[..., Lanes]]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "fma": (3, lambda a, b, c: (a.astype(np.float64) * b + c).astype(a.dtype)),
    "div": (2, np.divide),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
    "min": (2, np.fmin),
    "max": (2, np.fmax),
    "sqrt": (1, np.sqrt),
    "rsqrt": (1, lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype)),
    "rcp": (1, lambda a: (1 / a.astype(np.float64)).astype(a.dtype)),
    "ex2": (1, np.exp2),
    "lg2": (1, np.log2),
    "tanh": (1, np.tanh),
}
_FLOAT_MODIFIERS = {"rn", "approx", "full", "ftz", "NaN"}


def _truncated(a: Lanes, b: Lanes) -> Lanes:
    """Divide as PTX does, towards 0; what division by 0 gives is undefined."""
    quotient = np.floor_divide(a, np.where(b == 0, 1, b).astype(a.dtype))
    remains = quotient * b != a
    truncated: Lanes = (quotient + (remains & ((a < 0) != (b < 0)))).astype(a.dtype)
    return truncated


_INTEGERS: dict[str, tuple[int, Callable[..., Lanes]]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "div": (2, _truncated),
    "rem": (2, lambda a, b: a - _truncated(a, b) * b),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
    "min": (2, np.minimum),
    "max": (2, np.maximum),
    "and": (2, np.bitwise_and),
    "or": (2, np.bitwise_or),
    "xor": (2, np.bitwise_xor),
    "not": (1, np.invert),
    "popc": (1, lambda a: np.bitwise_count(a).astype(np.uint32)),
}


def _float(scope: Scope) -> Action:
    """Build an operation on floating-point numbers."""
    kind, modifiers = scope.instruction.kind, set(scope.instruction.opcode[1:-1])
    known = _FLOATS.get(scope.instruction.name)
    if known is None or modifiers - _FLOAT_MODIFIERS or (kind == "f64" and scope.instruction.name == "fma"):
        raise scope.unknown()
    count, compute = known
    if "NaN" in modifiers:
        compute = {"min": np.minimum, "max": np.maximum}[scope.instruction.name]
    if kind in _HALVES:
        return elementwise(scope, [kind] * count, _on_halves(compute, kind))
    if "ftz" in modifiers:
        return elementwise(scope, [kind] * count, lambda *given: flushed(compute(*map(flushed, given))))
    return elementwise(scope, [kind] * count, compute)


def _on_halves(compute: Callable[..., Lanes], kind: str) -> Callable[..., Lanes]:
    """Let a function of float32 compute on float16 or bfloat16, on one or two numbers per lane."""
    single = kind.removesuffix("x2")

    def on_bits(*given: Lanes) -> Lanes:
        numbers = [widened(bits.view(np.uint16), single) for bits in given]
        return narrowed(compute(*numbers), single).view(given[0].dtype)

    if single == "f16" and kind == single:
        return lambda *given: compute(*(a.astype(np.float32) for a in given)).astype(np.float16)
    return on_bits


def _integer(scope: Scope) -> Action:
    """Build an operation on integers or bits; no modifiers are known but those of products."""
    instruction = scope.instruction
    kind = instruction.kind
    known = _INTEGERS.get(instruction.name)
    if known is None or len(instruction.opcode) != 2:
        raise scope.unknown()
    count, compute = known
    return elementwise(scope, [kind] * count, compute)


def _arithmetic(scope: Scope) -> Action:
    kind = scope.instruction.kind
    return _float(scope) if kind in _HALVES or kind in ("f32", "f64") else _integer(scope)


def _product(scope: Scope) -> Action:
    """Build mul and mad of integers: the low half, the high half, or all bits."""
    name, *modifiers, kind = scope.instruction.opcode
    if kind[0] not in "su":
        return _float(scope)
    added = name == "mad"
    if modifiers == ["lo"]:
        low: Callable[..., Lanes] = (lambda a, b, c: a * b + c) if added else np.multiply
        return elementwise(scope, [kind] * (2 + added), low)
    if kind not in _WIDER or modifiers not in (["wide"], ["hi"]) or (added and modifiers == ["hi"]):
        raise scope.unknown()
    wide, bits = DTYPES[_WIDER[kind]], int(kind[1:])
    if modifiers == ["hi"]:
        return elementwise(
            scope, [kind] * 2, lambda a, b: ((a.astype(wide) * b.astype(wide)) >> bits).astype(a.dtype)
        )
    if added:
        return elementwise(
            scope, [kind, kind, _WIDER[kind]], lambda a, b, c: a.astype(wide) * b.astype(wide) + c
        )
    return elementwise(scope, [kind] * 2, lambda a, b: a.astype(wide) * b.astype(wide))


def _shift(scope: Scope) -> Action:
    kind, left = scope.instruction.kind, scope.instruction.name == "shl"
    bits = int(kind[1:])

    def shift(a: Lanes, by: Lanes) -> Lanes:
        # All distances from the width on are the same: 0, or the sign.
        inside = np.minimum(by, bits - 1).astype(a.dtype)
        shifted: Lanes = a << inside if left else a >> inside
        if left or a.dtype.kind == "u":
            return np.asarray(np.where(by >= bits, 0, shifted).astype(a.dtype))
        return shifted

    return elementwise(scope, [kind, "u32"], shift)


def _bit_field(scope: Scope) -> Action:
    kind = scope.instruction.kind
    dtype, bits = DTYPES[kind], int(kind[1:])
    target, source, *where = scope.instruction.operands
    position, length = map(scope.number, where)
    if length <= 0 or position + length > bits:
        raise scope.unknown()
    read, write = scope.read(source, kind), scope.write(target)
    up, down = dtype.type(bits - position - length), dtype.type(bits - length)

    def act(warp: Warp, mask: Mask) -> None:
        write(warp, (read(warp) << up) >> down, mask)  # the shift of signed numbers extends the sign

    return act


def _permute(scope: Scope) -> Action:
    """Build prmt: each byte of the result is a byte of two registers, or the sign of one."""
    if scope.instruction.opcode != ("prmt", "b32"):
        raise scope.unknown()

    def permute(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
        both = np.stack([a, b], axis=1).view(np.uint8)  # [lanes, 8]
        chosen = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
        found = np.take_along_axis(both, (chosen & 7).astype(np.int64), axis=1)
        signs = np.where(found >= 128, 255, 0).astype(np.uint8)
        return np.ascontiguousarray(np.where(chosen >= 8, signs, found)).view(np.uint32)[:, 0]

    return elementwise(scope, ["b32"] * 3, permute)


def _select(scope: Scope) -> Action:
    kind = scope.instruction.kind
    return elementwise(scope, [kind, kind, "pred"], lambda a, b, chosen: np.asarray(np.where(chosen, a, b)))


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _set_predicate(scope: Scope) -> Action:
    """Build setp. Comparisons of floats with NaN are false, those whose name ends with u are true."""
    if len(scope.instruction.opcode) != 3:
        raise scope.unknown()
    _, comparison, kind = scope.instruction.opcode
    if kind[0] in "sub" and kind != "bf16":
        if comparison not in _COMPARISONS:
            raise scope.unknown()
        return elementwise(scope, [kind] * 2, _COMPARISONS[comparison])
    unordered = comparison[:-1] in _COMPARISONS and comparison.endswith("u")
    compare = _COMPARISONS.get(comparison[:-1] if unordered else comparison)
    if compare is None and comparison not in ("num", "nan"):
        raise scope.unknown()

    def test(a: Lanes, b: Lanes) -> Lanes:
        if kind == "bf16":
            a, b = widened(a, kind), widened(b, kind)
        nan: Lanes = np.isnan(a) | np.isnan(b)
        if compare is None:
            return nan if comparison == "nan" else ~nan
        found: Lanes = compare(a, b)
        return found | nan if unordered else found & ~nan

    return elementwise(scope, [kind] * 2, test)


def _move(scope: Scope) -> Action:
    """Build mov, which also splits a register into several or joins several."""
    kind = scope.instruction.kind
    target, source = scope.instruction.operands
    if target.startswith("{"):
        writes = [scope.write(part) for part in vector(target)]
        part = unsigned(DTYPES[kind].itemsize // len(writes))
        read = scope.read(source, kind)

        def split(warp: Warp, mask: Mask) -> None:
            parts = np.ascontiguousarray(read(warp)).view(part).reshape(LANES, len(writes))
            for index, write in enumerate(writes):
                write(warp, parts[:, index].copy(), mask)

        return split
    if source.startswith("{"):
        names = vector(source)
        reads = [scope.read(name, f"b{8 * DTYPES[kind].itemsize // len(names)}") for name in names]
        put = scope.write(target)

        def join(warp: Warp, mask: Mask) -> None:
            parts = np.stack([read(warp) for read in reads], axis=1)
            put(warp, parts.view(DTYPES[kind])[:, 0], mask)

        return join
    return elementwise(scope, [kind], lambda a: a)


def _convert(scope: Scope) -> Action:
    """Build cvt: to floats rounded to nearest even, to integers truncated and saturated."""
    _, *modifiers, target, source = scope.instruction.opcode
    if target in ("f16x2", "bf16x2") and source == "f32" and modifiers == ["rn"]:
        single = target.removesuffix("x2")
        return elementwise(
            scope,
            ["f32", "f32"],
            lambda high, low: np.stack([narrowed(low, single), narrowed(high, single)], axis=1).view(
                np.uint32
            )[:, 0],
        )
    dtype = DTYPES[target]
    floats = [kind for kind in (target, source) if kind[0] == "f" or kind == "bf16"]
    if len(floats) == 1 and floats == [source]:
        if modifiers != ["rzi"]:
            raise scope.unknown()
        return elementwise(scope, [source], lambda a: _saturated(a, dtype))
    if modifiers not in ([], ["rn"]) or target.endswith("x2") or source.endswith("x2"):
        raise scope.unknown()

    def convert(a: Lanes) -> Lanes:
        if source == "bf16":
            a = widened(a, source)
        return narrowed(a, target) if target == "bf16" else a.astype(dtype)

    return elementwise(scope, [source], convert)


def _saturated(numbers: Lanes, dtype: np.dtype[Any]) -> Lanes:
    """Truncate floats to integers; NaN becomes 0, and what is too large or too small a limit."""
    limits = np.iinfo(dtype)
    whole = np.trunc(numbers.astype(np.float64))
    high, low = whole >= float(limits.max), whole <= float(limits.min)
    found = np.where(np.isnan(whole) | high | low, 0, whole).astype(dtype)
    return np.where(high, dtype.type(limits.max), np.where(low, dtype.type(limits.min), found))


BUILDERS: dict[str, Callable[[Scope], Action]] = {
    **dict.fromkeys([*_FLOATS, *_INTEGERS], _arithmetic),
    "mul": _product,
    "mad": _product,
    "shl": _shift,
    "shr": _shift,
    "bfe": _bit_field,
    "prmt": _permute,
    "selp": _select,
    "setp": _set_predicate,
    "mov": _move,
    "cvt": _convert,
}
