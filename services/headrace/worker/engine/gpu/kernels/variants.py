"""What a kernel is compiled for: the types of its arguments, its constants and its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One specialisation of a kernel, as a launch with these arguments would compile it.

    name            unique in its module; says what it is for, such as "decode, head dim 128"
    kernel          a function decorated with `triton.jit`
    signature       Triton's type of each run-time argument, by name: "*bf16", "*fp32", "*i32", "i32", "fp32"
    constants       value of each `constexpr` argument, by name. Every argument is in one of the two
    num_warps       warps of a program
    num_stages      stages of software pipelines
    fp_fusion       whether multiplications and additions may be fused
    aligned         names of integer arguments that are multiples of 16, as strides usually are; pointers
                    always count as aligned to 16 bytes
    targets         compute capabilities that the variant is meant for, such as (90,); empty for all
    spills_allowed  the reason why the variant may spill registers; empty if it may not
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = True
    aligned: frozenset[str] = frozenset()
    targets: tuple[int, ...] = ()
    spills_allowed: str = ""
