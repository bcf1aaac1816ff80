"""Emit vector instructions from Python: numba intrinsics built with llvmlite.

With numba's own loops, LLVM's vectoriser chooses the registers, and the inner loops of a matrix product are
slower by a factor of three or more. The few loops that take most of the time are therefore written as LLVM
IR, with vectors of 16 lanes, which LLVM splits on CPUs with shorter registers. Arguments are addresses and
sizes in bytes, as int64; nothing is checked.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic as numba_intrinsic

from headrace.worker.engine.cpu.kernels.inlining import jit as jit
from headrace.worker.engine.cpu.kernels.inlining import jit_source as jit_source

LANES = 16

# Whether kernels check the bounds of their reads and writes. It takes time, and is meant for debugging.
CHECKED = os.environ.get("HEADRACE_CHECK_KERNELS", "") not in ("", "0")

_FEATURES = llvmlite.binding.get_host_cpu_features()
HAS_VNNI = bool(_FEATURES.get("avx512vnni"))  # four 8-bit products per lane and instruction
HAS_MASKS = bool(_FEATURES.get("avx512bw"))  # stores of some of the 16-bit lanes of a vector
HAS_BF16 = bool(_FEATURES.get("avx512bf16"))  # two bfloat16 products per lane and instruction


class _BFloat(ir.Type):
    """LLVM's type bfloat, which llvmlite does not provide."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
INTS = ir.VectorType(I32, LANES)
SHORTS = ir.VectorType(I16, LANES)
FLOATS = ir.VectorType(F32, LANES)
_BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)

Value = Any
Builder = Any


def intrinsic(arguments: Sequence[Any], result: Any = types.void) -> Callable[[Callable[..., Any]], Any]:
    """Turn a function that emits IR into a numba intrinsic; a decorator, see `make_intrinsic`."""
    return lambda emit: make_intrinsic(arguments, emit, result)


def make_intrinsic(
    arguments: Sequence[Any], emit: Callable[..., Value | None], result: Any = types.void
) -> Any:
    """Make a numba intrinsic from a function that emits IR.

    arguments   numba types of the arguments
    emit        called with the builder and one IR value per argument; returns the IR value of the result
    """
    names = [f"a{i}" for i in range(len(arguments))]

    def typed(typing_context: Any, *given: Any) -> Any:
        def codegen(context: Any, builder: Builder, signature: Any, values: Any) -> Value:
            out = emit(builder, *values)
            return context.get_dummy_value() if out is None else out

        return result(*arguments), codegen

    # numba takes the number of arguments from the signature of the function.
    scope: dict[str, Any] = {"typed": typed}
    exec(f"def made(context, {', '.join(names)}): return typed(context, {', '.join(names)})", scope)
    return numba_intrinsic(scope["made"])


def address(array: npt.NDArray[Any]) -> int:
    """Return the address of a writable array's first element; 0 if it is empty.

    Takes a seventh of the time of `array.ctypes.data`, unless the array is structured.
    """
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data)) if array.size else 0


def integer(value: int) -> Value:
    """Return a 64-bit constant."""
    return ir.Constant(I64, value)


def floats(value: float) -> Value:
    """Return a vector constant with the same number in every lane."""
    return ir.Constant(FLOATS, [value] * LANES)


def ints(value: int) -> Value:
    """Return a vector constant of 32-bit integers, all equal."""
    return ir.Constant(INTS, [value] * LANES)


def load(builder: Builder, address: Value, kind: Any, align: int = 4) -> Value:
    """Load a scalar or vector."""
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = align
    return loaded


def store(builder: Builder, address: Value, value: Value, align: int = 4) -> None:
    """Store a scalar or vector."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def prefetch(builder: Builder, address: Value, *, level: int = 1, write: bool = False) -> None:
    """Prefetch a cache line, to be read or written; an invalid address does no harm.

    level   1 for all caches, 2 for all but the first, which holds what is in use
    """
    pointer = builder.inttoptr(address, I8.as_pointer())
    hints = [ir.Constant(I32, hint) for hint in (int(write), 4 - level, 1)]  # the last one means data
    call(builder, "llvm.prefetch.p0", pointer, *hints, result=ir.VoidType())


def offset(builder: Builder, address: Value, count: Value, size: int) -> Value:
    """Return address + count * size."""
    return builder.add(address, builder.mul(count, integer(size)))


def splat(builder: Builder, scalar: Value) -> Value:
    """Return a vector with the scalar in every lane."""
    kind = ir.VectorType(scalar.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(INTS, [0] * LANES))


def call(builder: Builder, name: str, *arguments: Value, result: Any = None) -> Value:
    """Call an LLVM intrinsic by its full name. The result has the type of the first argument by default."""
    kinds = [argument.type for argument in arguments]
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result or kinds[0], kinds), name
    )
    return builder.call(function, arguments)


def fma(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    """Return a * b + c, rounded once."""
    return call(builder, f"llvm.fma.v{LANES}f32", a, b, c)


def widen(builder: Builder, shorts: Value) -> Value:
    """Convert 16 bfloat16 numbers, given as 16-bit integers, to float32."""
    return builder.bitcast(builder.shl(builder.zext(shorts, INTS), ints(16)), FLOATS)


def narrow(builder: Builder, values: Value) -> Value:
    """Convert 16 float32 numbers to bfloat16 in 16-bit integers, rounded to nearest even; NaN stays NaN."""
    bits = builder.bitcast(values, INTS)
    odd = builder.and_(builder.lshr(bits, ints(16)), ints(1))
    rounded = builder.lshr(builder.add(builder.add(bits, ints(0x7FFF)), odd), ints(16))
    known = builder.fcmp_ordered("==", values, values)
    return builder.trunc(builder.select(known, rounded, ints(0x7FC0)), SHORTS)


def narrow_normal(builder: Builder, values: Value) -> Value:
    """Convert as `narrow` does, values that are not subnormal: the instruction takes those for 0."""
    if not HAS_BF16:
        return narrow(builder, values)
    name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
    halves = call(builder, name, values, result=ir.VectorType(_BFloat(), LANES))
    return builder.bitcast(halves, SHORTS)


def dot_int8(builder: Builder, acc: Value, a: Value, w: Value) -> Value:
    """Add to each lane of acc the four products of its bytes: a unsigned, w signed, all [16] int32."""
    if not HAS_VNNI:  # never executed: `decoder` rejects int8 on such machines
        return acc
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", acc, a, w)


def dot_bf16(builder: Builder, acc: Value, a: Value, w: Value) -> Value:
    """Add to each lane of acc the two products of its bfloat16 halves; acc float32, a and w [16] int32."""
    if HAS_BF16:
        halves = [builder.bitcast(value, _BFLOATS) for value in (a, w)]
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", acc, *halves)
    high = ints(-65536)
    lower = [builder.shl(value, ints(16)) for value in (a, w)]
    upper = [builder.and_(value, high) for value in (a, w)]
    for left, right in (lower, upper):
        acc = fma(builder, builder.bitcast(left, FLOATS), builder.bitcast(right, FLOATS), acc)
    return acc


def reduce(builder: Builder, vector: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """Combine all lanes to a scalar, in a fixed order, halves first."""
    width = LANES // 2
    while width:
        order = [(lane + width) % LANES for lane in range(LANES)]
        swapped = builder.shuffle_vector(vector, vector, ir.Constant(INTS, order))
        vector = combine(vector, swapped)
        width //= 2
    return builder.extract_element(vector, ir.Constant(I32, 0))


def reduce_rows(
    builder: Builder, vectors: Sequence[Value], combine: Callable[[Value, Value], Value]
) -> Value:
    """Combine the lanes of each of 1, 2, 4, 8 or 16 vectors, in the order of `reduce`; all at once.

    Returns one vector, with the result of vector i in lane i.
    """
    held = list(vectors)
    width = LANES // 2
    while width:
        lanes = [lane for lane in range(LANES) if not lane & width]
        lanes += [LANES + lane for lane in lanes]
        order = [ir.Constant(INTS, [lane + step for lane in lanes]) for step in (0, width)]
        pairs = zip(held[::2], held[1::2], strict=True) if len(held) > 1 else [(held[0], held[0])]
        held = [combine(*(builder.shuffle_vector(*pair, each) for each in order)) for pair in pairs]
        width //= 2
    return held[0]


def exp(builder: Builder, x: Value) -> Value:
    """Return e to the power of each lane; see `exp_all`."""
    return exp_all(builder, [x])[0]


def exp_all(builder: Builder, x: Sequence[Value]) -> list[Value]:
    """Return e to the power of each lane of some vectors.

    For inputs up to 87; exactly 1 at 0 and exactly 0 below -87. Range reduction by ln 2 and a polynomial of
    degree 6, relative error below 2e-7 (Cephes, expf.c). Each instruction waits for the previous one of its
    vector, so those of several vectors are emitted in turns.
    """
    b = builder
    log2e, high, low = 1.44269504088896341, 0.693359375, -2.12194440e-4
    # The sum is so large that its last bits are the integer n + 128: shifted, they are the exponent of
    # 2 ** (n + 1), so the polynomial is half of the power of the rest.
    large = floats(1.5 * 2.0**23 + 128.0)
    sums = [b.fmul(each, floats(log2e)) for each in x]
    sums = [b.fadd(each, large) for each in sums]
    n = [b.fsub(each, large) for each in sums]
    r = [fma(b, whole, floats(-high), each) for whole, each in zip(n, x, strict=True)]
    r = [fma(b, whole, floats(-low), each) for whole, each in zip(n, r, strict=True)]
    p = [floats(1.9875691500e-4 / 2)] * len(x)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5, 1.0, 1.0):
        p = [fma(b, power, each, floats(coefficient / 2)) for power, each in zip(p, r, strict=True)]
    powers = [b.bitcast(b.shl(b.bitcast(each, INTS), ints(23)), FLOATS) for each in sums]
    results = [b.fmul(each, power) for each, power in zip(p, powers, strict=True)]
    below = [b.fcmp_ordered("<=", each, floats(-87.0)) for each in x]  # false for NaN, which stays NaN
    return [b.select(zero, floats(0.0), each) for zero, each in zip(below, results, strict=True)]


def counted_loop(
    builder: Builder,
    count: Value,
    carried: Sequence[Value],
    body: Callable[[Value, list[Value]], list[Value]],
) -> list[Value]:
    """Emit a loop over 0 .. count-1, which runs at least once and carries values between iterations.

    body   receives the index and the carried values, and returns the new values
    """
    before = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    index = builder.phi(I64)
    index.add_incoming(integer(0), before)
    held = []
    for value in carried:
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        held.append(phi)
    new = body(index, list(held))
    following = builder.add(index, integer(1))
    end = builder.block
    index.add_incoming(following, end)
    for phi, value in zip(held, new, strict=True):
        phi.add_incoming(value, end)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
    builder.position_at_end(done)
    return new
