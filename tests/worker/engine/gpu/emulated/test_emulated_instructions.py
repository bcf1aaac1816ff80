"""Instructions of the emulator, one at a time, against what NVIDIA's PTX ISA defines."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch

from tests.worker.engine.gpu.ptx.emulation import Emulated
from tests.worker.engine.gpu.ptx.errors import EmulationError, UnknownInstructionError
from tests.worker.engine.gpu.ptx.memory import memory_of

_KERNEL = """
.visible .entry one(.param .u64 one_param_0)
.reqntid 32
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [one_param_0];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd2, %r1, 8;
	add.s64 	%rd3, %rd1, %rd2;
	ld.global.v2.b32 	{{%r2, %r3}}, [%rd3];
	{body}
	st.global.b32 	[%rd3], %r4;
	ret;
}}
"""


def compute(body: str, first: list[int], second: list[int]) -> list[int]:
    """Run instructions on %r2 and %r3 of each lane; return %r4. Fewer than 32 numbers are repeated."""
    lanes = np.array([[first[i % len(first)], second[i % len(second)]] for i in range(32)], np.uint32)
    memory = torch.from_numpy(lanes.view(np.int32))
    Emulated(_KERNEL.format(body=body), 0).run(
        (1,), {"one_param_0": memory.data_ptr()}, memory_of({"lanes": memory}), Random(0)
    )
    return [int(number) for number in lanes[:, 0]]


def bits(number: float) -> int:
    return int(np.float32(number).view(np.uint32))


ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("body", "first", "second", "expected"),
    [
        ("add.s32 %r4, %r2, %r3;", ONES, 3, 2),
        ("shl.b32 %r4, %r2, %r3;", 1, 33, 0),
        ("shr.s32 %r4, %r2, %r3;", 0x80000000, 40, ONES),
        ("shr.u32 %r4, %r2, %r3;", 0x80000000, 31, 1),
        ("div.s32 %r4, %r2, %r3;", -7 % 2**32, 2, -3 % 2**32),
        ("rem.s32 %r4, %r2, %r3;", -7 % 2**32, 2, -1 % 2**32),
        ("div.u32 %r4, %r2, %r3;", ONES, 2, 0x7FFFFFFF),
        ("mul.wide.s32 %rd4, %r2, %r3;\nmov.b64 {_, %r4}, %rd4;", ONES, 2, ONES),
        ("mul.wide.u32 %rd4, %r2, %r3;\nmov.b64 {%r4, _}, %rd4;", ONES, 2, ONES - 1),
        ("bfe.s32 %r4, %r2, 4, 4;", 0xF0, 0, ONES),
        ("bfe.u32 %r4, %r2, 4, 4;", 0xF0, 0, 0xF),
        ("popc.b32 %r4, %r2;", 0xF0F0, 0, 8),
        ("prmt.b32 %r4, %r2, %r3, 0x5410U;", 0x33221100, 0x77665544, 0x55441100),
        ("prmt.b32 %r4, %r2, %r3, 0x888B;", 0x80221100, 0, 0x000000FF),
        ("cvt.rzi.s32.f32 %r4, %r2;", bits(-1.9), 0, -1 % 2**32),
        ("cvt.rzi.s32.f32 %r4, %r2;", bits(1e20), 0, 0x7FFFFFFF),
        ("cvt.rzi.s32.f32 %r4, %r2;", bits(math.nan), 0, 0),
        ("cvt.rn.f32.s32 %r4, %r2;", 16777217, 0, bits(16777216.0)),
        ("cvt.rn.bf16x2.f32 %r4, %r2, %r3;", bits(1.0), bits(2.0), 0x3F804000),
        # Halfway: to the even neighbour.
        ("cvt.rn.bf16.f32 %rs1, %r2;\ncvt.u32.u16 %r4, %rs1;", 0x3F808000, 0, 0x3F80),
        ("cvt.rn.bf16.f32 %rs1, %r2;\ncvt.u32.u16 %r4, %rs1;", 0x3F818000, 0, 0x3F82),
        ("cvt.s16.s32 %rs1, %r2;\ncvt.s32.s16 %r4, %rs1;", 0x8000, 0, 0xFFFF8000),
        ("max.f32 %r4, %r2, %r3;", bits(math.nan), bits(-1.0), bits(-1.0)),
        ("setp.ne.f32 %p1, %r2, %r3;\nselp.b32 %r4, 1, 0, %p1;", bits(math.nan), 0, 0),
        ("setp.neu.f32 %p1, %r2, %r3;\nselp.b32 %r4, 1, 0, %p1;", bits(math.nan), 0, 1),
        ("setp.num.f32 %p1, %r2, %r3;\nselp.b32 %r4, 1, 0, %p1;", bits(math.nan), 0, 0),
        ("ex2.approx.ftz.f32 %r4, %r2;", bits(-130.0), 0, 0),
        ("add.bf16x2 %r4, %r2, %r3;", 0x3F804000, 0x3F803F80, 0x40004040),
        ("mov.b32 %r4, 7;\nsetp.eq.b32 %p1, %r2, 1;\n@%p1 mov.b32 %r4, 8;", 1, 0, 8),
        ("mov.b32 %r4, 7;\nsetp.eq.b32 %p1, %r2, 1;\n@!%p1 mov.b32 %r4, 8;", 1, 0, 7),
    ],
)  # fmt: skip
def test_an_instruction_computes_what_its_section_defines(
    body: str, first: int, second: int, expected: int
) -> None:
    assert compute(body, [first], [second]) == [expected] * 32


def test_lanes_exchange_numbers() -> None:
    lanes = list(range(32))

    def shuffled(mode: str, distance: int, clamp: int) -> list[int]:
        return compute(f"shfl.sync.{mode}.b32 %r4, %r2, {distance}, {clamp}, -1;", lanes, [0])

    assert shuffled("bfly", 16, 31) == [lane ^ 16 for lane in lanes]
    assert shuffled("up", 3, 0) == [0, 1, 2, *range(29)]
    assert shuffled("down", 3, 31) == [*range(3, 32), 29, 30, 31]
    assert shuffled("idx", 5, 31) == [5] * 32
    assert shuffled("idx", 1, 0x181F) == [lane // 8 * 8 + 1 for lane in lanes]  # segments of 8 lanes


def test_warps_vote_and_reduce() -> None:
    odd = "and.b32 %r5, %r2, 1;\nsetp.eq.b32 %p1, %r5, 1;\nvote.sync.ballot.b32 %r4, %p1, -1;"

    assert compute(odd, list(range(32)), [0]) == [0xAAAAAAAA] * 32
    assert compute("redux.sync.add.s32 %r4, %r2, %r3;", list(range(32)), [ONES]) == [496] * 32
    assert compute("redux.sync.min.s32 %r4, %r2, %r3;", [5, -4 % 2**32], [ONES]) == [-4 % 2**32] * 32


def test_lanes_that_take_different_branches_meet_again() -> None:
    body = """
	mov.b32 	%r4, 0;
	setp.lt.u32 	%p1, %r2, 8;
	@%p1 bra 	$far;
$loop:
	add.s32 	%r4, %r4, 2;
	setp.lt.u32 	%p2, %r4, %r2;
	@%p2 bra 	$loop;
	bra.uni 	$end;
$far:
	mov.b32 	%r4, 1;
$end:
	shl.b32 	%r4, %r4, 1;
"""
    assert compute(body, list(range(32)), [0]) == [
        2 if lane < 8 else 2 * (lane + lane % 2) for lane in range(32)
    ]


def test_a_shuffle_among_some_lanes_is_an_error() -> None:
    body = "setp.lt.u32 %p1, %r2, 8;\n@%p1 shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;"

    with pytest.raises(EmulationError, match="only 8 of 32 lanes"):
        compute(body, list(range(32)), [0])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "ld.global.b32 %r4, [%rd1+256];",
            "outside of all memory: lanes has 256 bytes, the access is at 256",
        ),
        ("ld.global.b32 %r4, [%rd1+-4];", "the access is at -4"),
        ("ld.global.b32 %r4, [%rd1+2];", "is not a multiple of 4"),
        ("ld.shared.b32 %r4, [0];", "outside of all memory"),
    ],
)
def test_a_wrong_access_is_an_error(body: str, message: str) -> None:
    with pytest.raises(EmulationError) as raised:
        compute(body, [0], [0])

    assert message in str(raised.value)
    assert "one, program (0, 0, 0) of (1, 1, 1), warp 0: `ld." in str(raised.value)


@pytest.mark.parametrize(
    "body", ["sin.approx.f32 %r4, %r2;", "add.f32 %r4, %r2, %q1;", "ld.tiny.b32 %r4, [%rd1];"]
)
def test_what_is_not_known_is_named(body: str) -> None:
    with pytest.raises(UnknownInstructionError, match=r"does not know `\w+"):
        compute(body, [0], [0])
