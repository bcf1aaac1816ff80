"""Sampling noise as a pure function: equal seed, position and token give equal noise on every worker.

A counter-based generator has no state (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).
An answer that is resumed on another worker therefore gets the same noise, whatever else is in its batch.
"""

from __future__ import annotations

import torch

_WORD = (1 << 64) - 1


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """Derive the key of one draw with SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).

    seed       unsigned, 64 bits
    position   position of the token in the sequence, prompt included

    Returns two signed 32-bit words that depend on every bit of both arguments.
    """
    # The seed is mixed first: otherwise (seed, position + 1) would equal (seed + increment, position).
    mixed = _splitmix(_splitmix(seed & _WORD) ^ position)
    return _signed(mixed >> 32), _signed(mixed & 0xFFFFFFFF)


def gumbel(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return standard Gumbel noise: the argmax of logits plus noise is a sample from their softmax.

    (Maddison, Tarlow & Minka, A* Sampling, NeurIPS 2014.)

    keys   [rows, 2] int32, from `noise_key`
    ids    [rows or 1, tokens] int32, the token of each number

    Returns [rows, tokens] float32, between -2.9 and 16.7: the uniforms have 23 bits, so that neither 0 nor 1
    occurs in float32.
    """
    bits = ids * _signed(0x9E3779B1) ^ keys[:, :1]
    bits = _mix_(_mix_(bits).bitwise_xor_(keys[:, 1:]))
    uniform = bits.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF).float()
    return uniform.add_(0.5).mul_(2.0**-23).log_().neg_().log_().neg_()


def _mix_(bits: torch.Tensor) -> torch.Tensor:
    """Scramble int32 words in place: fmix32, the finalizer of MurmurHash3 (Appleby, public domain)."""
    # torch shifts signed numbers arithmetically; the masks clear the copied sign bits.
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(_signed(0x85EBCA6B))
    bits.bitwise_xor_((bits >> 13).bitwise_and_(0x7FFFF)).mul_(_signed(0xC2B2AE35))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def _splitmix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
    return state ^ (state >> 31)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
