"""Sampling noise as a pure function: equal seed, position and token give equal noise on every worker.

A counter-based generator has no state (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).
An answer that is resumed on another worker therefore gets the same noise, whatever else is in its batch and
whatever the device. `gumbel` is the definition; `cpu.kernels.sampling` and `gpu.kernels.sampling` compute the
same numbers where they are needed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from headrace.worker.engine import fixed_math

_WORD = (1 << 64) - 1

# Multipliers of the hash of a token's id: the golden ratio, and those of `_mix`.
GOLDEN, MIX_FIRST, MIX_SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """Derive the key of one draw with SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).

    seed       unsigned, 64 bits
    position   position of the token in the sequence, prompt included

    Returns two signed 32-bit words that depend on every bit of both arguments.
    """
    # The seed is mixed first: otherwise (seed, position + 1) would equal (seed + increment, position).
    mixed = _splitmix(_splitmix(seed & _WORD) ^ position)
    return _signed(mixed >> 32), _signed(mixed & 0xFFFFFFFF)


def noise_keys(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """Derive the keys of many draws, see `noise_key`. Returns [draws, 2]."""
    mixed = _splitmix_array(_splitmix_array(seeds) ^ positions)
    keys = np.empty((len(mixed), 2), np.uint32)
    keys[:, 0] = mixed >> np.uint64(32)
    keys[:, 1] = mixed & np.uint64(0xFFFFFFFF)
    return keys.view(np.int32)


def gumbel(keys: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Return standard Gumbel noise: the argmax of logits plus noise is a sample from their softmax.

    (Maddison, Tarlow & Minka, A* Sampling, NeurIPS 2014.)

    keys   [rows, 2] int32, from `noise_key`
    ids    [rows or 1, tokens] int32, the token of each number

    Returns [rows, tokens] float32, between -2.9 and 16.7: the uniforms have 23 bits, so that neither 0 nor 1
    occurs in float32.
    """
    words = keys.view(np.uint32)
    bits = ids.view(np.uint32) * np.uint32(GOLDEN) ^ words[:, :1]
    return gumbel_of_bits(_mix(_mix(bits) ^ words[:, 1:]))


def gumbel_of_bits(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """Return the Gumbel noise of random words."""
    uniform = ((bits >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    # Subtracted from 0, because not every compiler's negation turns 0 into -0.
    zero = np.float32(0)
    return np.asarray(zero - fixed_math.log(np.asarray(zero - fixed_math.log(uniform))))


def _mix(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Scramble words: fmix32, the finalizer of MurmurHash3 (Appleby, public domain)."""
    bits = (bits ^ bits >> np.uint32(16)) * np.uint32(MIX_FIRST)
    bits = (bits ^ bits >> np.uint32(13)) * np.uint32(MIX_SECOND)
    return bits ^ bits >> np.uint32(16)


def _splitmix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
    return state ^ (state >> 31)


def _splitmix_array(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return state ^ state >> np.uint64(31)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
