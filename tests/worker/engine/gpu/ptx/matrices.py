"""Instructions of a warp on matrices: ldmatrix, stmatrix, mma.sync and wgmma.

The places of numbers in registers are those of the figures in the ISA's sections "Warp Level Matrix
Multiply-Accumulate Instructions" and "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
The products of an instruction are summed in float64 and rounded once, to float32; tensor cores truncate, in
an order that is not documented.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.worker.engine.gpu.ptx.errors import WrongAccess
from tests.worker.engine.gpu.ptx.formats import LANES, Lanes, Mask, widened
from tests.worker.engine.gpu.ptx.memory import Addresses
from tests.worker.engine.gpu.ptx.operands import Action, Read, Scope, Write, all_lanes
from tests.worker.engine.gpu.ptx.parsing import vector
from tests.worker.engine.gpu.ptx.transfers import memory_named
from tests.worker.engine.gpu.ptx.warps import Warp

Matrix = npt.NDArray[Any]

_LANE = np.arange(LANES)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4


class _Places(NamedTuple):
    """Where the numbers of a fragment are in its matrix: [numbers per lane, lanes]."""

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]


def _of_left() -> _Places:
    """Return the places of A, 16 x 16, eight numbers of 16 bits per lane."""
    number = np.arange(8)[:, None]
    return _Places(_GROUP + 8 * (number // 2 % 2), 2 * _IN_GROUP + number % 2 + 8 * (number // 4))


def _of_right() -> _Places:
    """Return the places of B, 16 x 8, four numbers of 16 bits per lane."""
    number = np.arange(4)[:, None]
    return _Places(2 * _IN_GROUP + number % 2 + 8 * (number // 2), _GROUP + 0 * number)


def _of_sums(columns: int) -> _Places:
    """Return the places of C and D, 16 x columns, in float32."""
    number = np.arange(columns // 2)[:, None]
    return _Places(_GROUP + 8 * (number // 2 % 2), 8 * (number // 4) + 2 * _IN_GROUP + number % 2)


_LEFT, _RIGHT = _of_left(), _of_right()


def _halves(registers: list[Lanes], kind: str) -> Matrix:
    """Return the numbers of 16 bits in registers: [numbers, lanes]."""
    bits = np.stack(registers, axis=1).view(np.uint16)  # [lanes, numbers]
    return widened(np.ascontiguousarray(bits.T), kind)


def _matrix(numbers: Matrix, places: _Places, shape: tuple[int, int]) -> Matrix:
    whole = np.zeros(shape)
    whole[places] = numbers
    return whole


def _sum_of_products(left: Matrix, right: Matrix, sums: Matrix | float) -> Matrix:
    found: Matrix = (left @ right + sums).astype(np.float32)
    return found


def _multiply(scope: Scope) -> Action:
    """Build mma.sync.m16n8k16 with float32 sums."""
    opcode = scope.instruction.opcode
    kind = opcode[7] if len(opcode) == 10 else ""
    wanted = ("mma", "sync", "aligned", "m16n8k16", "row", "col", "f32", kind, kind, "f32")
    if opcode != wanted or kind not in ("f16", "bf16"):
        raise scope.unknown()
    target, left, right, sums = (vector(operand) for operand in scope.instruction.operands)
    writes = [scope.write(name) for name in target]
    read_left, read_right = ([scope.read(name, "b32") for name in names] for names in (left, right))
    read_sums = [scope.read(name, "f32") for name in sums]
    places = _of_sums(8)

    def act(warp: Warp, mask: Mask) -> None:
        all_lanes(mask)
        found = _sum_of_products(
            _matrix(_halves([read(warp) for read in read_left], kind), _LEFT, (16, 16)),
            _matrix(_halves([read(warp) for read in read_right], kind), _RIGHT, (16, 8)),
            _matrix(np.stack([read(warp) for read in read_sums]), places, (16, 8)),
        )
        for write, numbers in zip(writes, found[places], strict=True):
            write(warp, numbers, None)

    return act


def _move_matrices(scope: Scope) -> Action:
    """Build ldmatrix and stmatrix: one, two or four matrices of 8 x 8 numbers of 16 bits.

    Lanes 8k to 8k + 7 have the addresses of the rows of matrix k.
    """
    name, *modifiers = scope.instruction.opcode
    transposed = "trans" in modifiers
    rest = [modifier for modifier in modifiers if modifier != "trans"]
    load = name == "ldmatrix"
    registers, where = scope.instruction.operands if load else reversed(scope.instruction.operands)
    names = vector(registers)
    if rest != ["sync", "aligned", "m8n8", f"x{len(names)}", rest[-2], "b16"]:
        raise scope.unknown()
    memory, address = memory_named(scope, rest[-2]), scope.address(where)
    writes = [scope.write(name) for name in names] if load else []
    reads = [] if load else [scope.read(name, "b32") for name in names]
    columns = 2 * _IN_GROUP[:, None] + np.arange(2)

    def act(warp: Warp, mask: Mask) -> None:
        all_lanes(mask)
        places = address(warp)
        for number in range(len(names)):
            rows = places[8 * number : 8 * number + 8]
            if load:
                matrix = memory(warp).read(rows, np.dtype(np.uint16), 8)
                pairs = (matrix.T if transposed else matrix)[_GROUP[:, None], columns]
                writes[number](warp, np.ascontiguousarray(pairs).view(np.uint32)[:, 0], None)
            else:
                matrix = np.empty((8, 8), np.uint16)
                matrix[_GROUP[:, None], columns] = np.ascontiguousarray(reads[number](warp))[:, None].view(
                    np.uint16
                )
                memory(warp).write(rows, np.ascontiguousarray(matrix.T if transposed else matrix))

    return act


_SWIZZLED_BYTES = {1: 128, 2: 64, 3: 32}


class _Described(NamedTuple):
    """A matrix in shared memory, as the 64 bits of a matrix descriptor say (ISA, "Matrix Descriptor Format").

    leading, stride   distances in bytes between its parts
    width             bytes of a row of a part, within which pieces of 16 bytes are swizzled
    """

    start: int
    leading: int
    stride: int
    width: int


def _described(bits: int) -> _Described:
    width = _SWIZZLED_BYTES.get(bits >> 62)
    if width is None or bits >> 49 & 7:
        raise WrongAccess(
            f"matrix descriptor {bits:#x}: the emulator knows swizzled layouts without offset only"
        )
    start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    return _Described(start, leading, stride, width)


def _places_of(matrix: _Described, rows: Addresses, *, transposed: bool) -> Addresses:
    """Return the addresses of 16 numbers of each row (of A; of B, of each column).

    transposed   the numbers of a column are adjacent, not those of a row (the ISA's "MN-major")
    """
    row, depth = rows[:, None], np.arange(16)
    if transposed:
        numbers = matrix.width // 2
        found = row // numbers * matrix.leading + row % numbers * 2
        found = found + depth % 8 * matrix.width + depth // 8 * matrix.stride
    else:
        found = row // 8 * matrix.stride + row % 8 * matrix.width + depth * 2
    found = found + matrix.start
    places: Addresses = found ^ ((found >> 7 & (matrix.width // 16 - 1)) << 4)
    return places


class _Product(NamedTuple):
    """Operands of wgmma.mma_async.

    left                the registers of A; empty if it is in shared memory
    left_at, right_at   descriptors
    accumulate          whether the products are added to the sums
    """

    kind: str
    columns: int
    left: list[Read]
    left_at: Read | None
    right_at: Read
    accumulate: Read
    left_transposed: bool
    right_transposed: bool
    sums: list[Read]
    writes: list[Write]


def _product_of(scope: Scope) -> _Product:
    opcode, operands = scope.instruction.opcode, scope.instruction.operands
    shape = re.fullmatch(r"m64n(\d+)k16", opcode[4])
    kind = opcode[-1]
    if shape is None or opcode[5:] != ("f32", kind, kind) or kind not in ("f16", "bf16"):
        raise scope.unknown()
    sums, left, right, accumulate, *constants = operands
    in_registers = left.startswith("{")
    signs, transposed = constants[:2], [scope.number(text) != 0 for text in constants[2:]]
    if signs != ["1", "1"] or len(transposed) != (1 if in_registers else 2):
        raise scope.unknown()
    names = vector(sums)
    return _Product(
        kind,
        int(shape[1]),
        [scope.read(name, "b32") for name in vector(left)] if in_registers else [],
        None if in_registers else scope.read(left, "b64"),
        scope.read(right, "b64"),
        scope.read(accumulate, "pred"),
        not in_registers and transposed[0],
        transposed[-1],
        [scope.read(name, "f32") for name in names],
        [scope.write(name) for name in names],
    )


def _multiply_by_group(scope: Scope) -> Action:
    """Build wgmma: four warps multiply a matrix of 64 rows, each has the sums of 16 of them."""
    action = scope.instruction.opcode[1]
    if action == "fence":
        return lambda warp, mask: all_lanes(mask)
    if action == "commit_group":
        return lambda warp, mask: warp.products.commit()
    if action == "wait_group":
        allowed = scope.number(scope.instruction.operands[0])
        return lambda warp, mask: warp.products.wait(allowed)
    if action != "mma_async":
        raise scope.unknown()
    product = _product_of(scope)
    sum_places, columns = _of_sums(product.columns), np.arange(product.columns)

    def in_memory(warp: Warp, read: Read, rows: Addresses, transposed: bool) -> Addresses:
        places = _places_of(_described(int(read(warp)[0])), rows, transposed=transposed)
        warp.program.shared.check(places.ravel(), 2)
        return places

    def numbers(warp: Warp, places: Addresses) -> Matrix:
        bits = warp.program.shared.read(places.ravel(), np.dtype(np.uint16))[:, 0]
        return widened(bits, product.kind).astype(np.float64).reshape(places.shape)

    def act(warp: Warp, mask: Mask) -> None:
        all_lanes(mask)
        right_places = in_memory(warp, product.right_at, columns, product.right_transposed)
        accumulate = bool(product.accumulate(warp)[0])
        given = left_places = None
        if product.left_at is None:
            given = _matrix(_halves([read(warp) for read in product.left], product.kind), _LEFT, (16, 16))
        else:
            rows = np.arange(16) + 16 * (warp.number % 4)
            left_places = in_memory(warp, product.left_at, rows, product.left_transposed)

        def multiply() -> None:
            left = given if left_places is None else numbers(warp, left_places)
            sums: Matrix | float = 0.0
            if accumulate:
                read = np.stack([read(warp) for read in product.sums])
                sums = _matrix(read, sum_places, (16, product.columns))
            assert left is not None
            found = _sum_of_products(left, numbers(warp, right_places).T, sums)
            for write, own in zip(product.writes, found[sum_places], strict=True):
                write(warp, own, None)

        warp.products.add(multiply)

    return act


BUILDERS: dict[str, Callable[[Scope], Action]] = {
    "mma": _multiply,
    "ldmatrix": _move_matrices,
    "stmatrix": _move_matrices,
    "wgmma": _multiply_by_group,
}
