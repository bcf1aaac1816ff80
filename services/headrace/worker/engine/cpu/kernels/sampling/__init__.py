"""Sample the next token of rows of logits: maximum, filters, noise and argmax, one thread per row.

`worker.engine.sampling` describes the result; it also applies penalties and biases before. Filters leave the
tokens whose score is at least a least score: it is looked for among the few likeliest tokens first, and among
all tokens if those do not suffice. Noise is computed only for tokens that it can make the greatest.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, types

from headrace.worker.engine.cpu.kernels import machine as m
from headrace.worker.engine.cpu.kernels import team, vector_math
from headrace.worker.engine.cpu.kernels.cache import compile_entry_point
from headrace.worker.engine.cpu.kernels.elementwise import pointer
from headrace.worker.engine.cpu.kernels.machine import integer, offset
from headrace.worker.engine.cpu.kernels.sampling.filtering import (
    collect,
    few_likeliest,
    least_of,
    mass_of,
    weigh,
)
from headrace.worker.engine.cpu.kernels.sampling.masking import mask

_i8, _f4 = types.int64, types.float32

ROW = np.dtype(
    [
        ("scores", np.int64),  # address of [vocabulary] float32: logits after penalties and biases
        ("mask", np.int64),  # address of one bit per token, in int32: whether it may be sampled; 0: all may
        ("logits", np.int64),  # address of [vocabulary] float32: the model's, read for log-probabilities
        ("top_k", np.int64),  # 0 for all tokens
        ("top_p", np.float32),  # 1 for all tokens
        ("temperature", np.float32),  # 0 for the likeliest token
        ("min_p_log", np.float32),  # logarithm of min_p
        ("key_first", np.int32),  # see `noise.noise_key`
        ("key_second", np.int32),
        ("logprobs", np.int32),  # whether to compute the log-probability
        # Results:
        ("finite", np.int32),  # whether the greatest score is finite; else there is no token
        ("id", np.int64),
        ("likeliest", np.int64),  # the token with the greatest score
        ("largest", np.float32),  # of logits
        ("own", np.float32),  # the token's logit
        ("mass", np.int64),  # sum of `fixed_math.weight` of logits - largest
    ],
    align=True,
)

_CALL = np.dtype(
    [
        ("rows", np.int64),
        ("count", np.int64),
        ("vocabulary", np.int64),
        ("candidates", np.int64),  # how many of the likeliest tokens the filters examine first
        ("scratch", np.int64),
        ("scratch_bytes", np.int64),  # of each thread
        ("counter", np.int64),
        ("failures", np.int64),  # address of a `team.FailureState`
    ]
)

WORK_OF_A_THREAD = 24  # likeliest tokens of rows, 3 us each: a thread is awake after 50 us
WORK_OF_A_DRAW = 24  # a draw with noise takes as long as 5 to 80 likeliest tokens
_CHUNK = 64  # vectors
_MOST_NOISE = 16.75  # a little more than `noise.gumbel` can be
_FLAGS = ir.VectorType(ir.IntType(1), m.LANES)


@m.intrinsic([_i8, _i8], _f4)
def vector_maximum(b: Any, x: Any, vectors: Any) -> Any:
    """Return the greatest number of x; NaN if any is NaN."""

    def larger(left: Any, right: Any) -> Any:
        return b.select(b.fcmp_ordered(">", left, right), left, right)

    def body(i: Any, carried: list[Any]) -> list[Any]:
        highest, unordered = carried
        value = m.load(b, offset(b, x, i, 64), m.FLOATS)
        # llvm.maximum would carry NaN as well, in three times as many instructions.
        return [larger(value, highest), b.or_(unordered, b.fcmp_unordered("uno", value, value))]

    initial = [m.floats(float("-inf")), ir.Constant(_FLAGS, [0] * m.LANES)]
    highest, unordered = m.counted_loop(b, vectors, initial, body)
    wrong = b.icmp_unsigned("!=", b.bitcast(unordered, m.I16), ir.Constant(m.I16, 0))
    return b.select(wrong, ir.Constant(m.F32, float("nan")), m.reduce(b, highest, larger))


@m.intrinsic([_i8, _i8, _f4, _f4, _i8])
def _scale(b: Any, x: Any, vectors: Any, largest: Any, temperature: Any, out: Any) -> None:
    """Store (x - largest) / temperature in out."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = b.fsub(m.load(b, offset(b, x, i, 64), m.FLOATS), m.splat(b, largest))
        m.store(b, offset(b, out, i, 64), b.fdiv(value, m.splat(b, temperature)))
        return []

    m.counted_loop(b, vectors, [], body)


@m.intrinsic([_i8, _i8, _i8, _f4, _i8, _i8, _i8])
def _draw(
    b: Any, x: Any, ids: Any, vectors: Any, least: Any, key_first: Any, key_second: Any, best: Any
) -> None:
    """Find the token with the greatest score plus noise among those with a score of at least *least*.

    x, ids   scores and their tokens
    best     address of [16] float32 and then [16] int32: receives the best of each lane, and its token
    """
    firsts, seconds = _keys(b, key_first, key_second)

    def body(i: Any, carried: list[Any]) -> list[Any]:
        highest, places = carried
        score = m.load(b, offset(b, x, i, 64), m.FLOATS)
        place = m.load(b, offset(b, ids, i, 64), m.INTS)
        noisy = b.fadd(score, vector_math.gumbel(b, place, firsts, seconds))
        kept = b.fcmp_ordered(">=", score, m.splat(b, least))
        better = b.and_(kept, b.fcmp_ordered(">", noisy, highest))
        return [b.select(better, noisy, highest), b.select(better, place, places)]

    initial = [m.floats(float("-inf")), m.ints(0)]
    highest, places = m.counted_loop(b, vectors, initial, body)
    m.store(b, best, highest)
    m.store(b, b.add(best, integer(64)), places)


@m.intrinsic([_i8, _i8, _i8], _f4)
def _noise_of(b: Any, token: Any, key_first: Any, key_second: Any) -> Any:
    """Return the noise of one token."""
    lanes = vector_math.gumbel(b, m.splat(b, b.trunc(token, m.I32)), *_keys(b, key_first, key_second))
    return b.extract_element(lanes, ir.Constant(m.I32, 0))


def _keys(b: Any, key_first: Any, key_second: Any) -> list[Any]:
    return [m.splat(b, b.trunc(key, m.I32)) for key in (key_first, key_second)]


@m.jit
def padded(x: int, vocabulary: int, space: int) -> int:
    """Return the address of x, or of a copy that is padded with -inf to a multiple of 16."""
    if vocabulary % m.LANES == 0:
        return x
    source = carray(pointer(x), (vocabulary,), np.float32)
    whole = (vocabulary + m.LANES - 1) // m.LANES * m.LANES
    copy = carray(pointer(space), (whole,), np.float32)
    copy[:vocabulary] = source
    copy[vocabulary:] = np.float32(-np.inf)
    return space


@m.jit
def likeliest_of(x: int, vectors: int) -> Any:
    """Return the greatest number of x and its first place; NaN if any is NaN."""
    largest, start = np.float32(-np.inf), 0
    for first in range(0, vectors, _CHUNK):
        found = vector_maximum(x + 64 * first, min(_CHUNK, vectors - first))
        if np.isnan(found):
            return found, 0
        if found > largest:
            largest, start = found, first * m.LANES
    numbers = carray(pointer(x), (vectors * m.LANES,), np.float32)
    while start < vectors * m.LANES and numbers[start] != largest:
        start += 1
    return largest, start


@m.jit
def _sample_row(call: Any, row: Any, scratch: int) -> None:
    vocabulary = call.vocabulary
    vectors = (vocabulary + m.LANES - 1) // m.LANES
    space = 64 * (vectors + 1)
    best, scaled, found = scratch, scratch + 128, scratch + 128 + space
    ids, weights, copy = found + space, found + 2 * space, found + 4 * space
    scores = padded(row.scores, vocabulary, copy)
    if row.mask != 0:
        mask(scores, row.mask, vectors, copy)
        scores = copy
    largest, row.likeliest = likeliest_of(scores, vectors)
    row.id = row.likeliest
    row.finite = np.isfinite(largest)
    if not row.finite:
        return
    if row.temperature > 0:
        top_k = row.top_k if 0 < row.top_k < vocabulary else 0
        zero = np.float32(0)
        least = np.float32(-np.inf)
        if top_k == 0 and row.top_p >= 1:
            # With the most noise, a token below the bar does not reach the likeliest one with its own.
            own = _noise_of(row.likeliest, row.key_first, row.key_second)
            reach = max(own - _MOST_NOISE, row.min_p_log - np.float32(0.01))
            bar = np.float64(largest) + np.float64(row.temperature) * reach
            count = collect(scores, vectors, np.float32(bar - 1e-6 * abs(bar)), found, ids)
            _scale(found, (count + m.LANES - 1) // m.LANES, largest, row.temperature, found)
        else:
            _scale(scores, vectors, largest, row.temperature, scaled)
            total = 0 if top_k > 0 else mass_of(scaled, vectors, zero)
            least = np.float32(np.nan)
            count = 0
            few = few_likeliest(scaled, vectors, call.candidates)
            if not np.isnan(few):
                count = collect(scaled, vectors, few, found, ids)
                weigh(found, (count + m.LANES - 1) // m.LANES, weights)
                least = least_of(found, weights, count, top_k, np.float64(row.top_p), total)
            if np.isnan(least):
                weigh(scaled, vectors, weights)
                least = least_of(scaled, weights, vocabulary, top_k, np.float64(row.top_p), total)
                count = collect(scaled, vectors, max(least, row.min_p_log), found, ids)
        _draw(
            found, ids, (count + m.LANES - 1) // m.LANES, max(least, row.min_p_log),
            row.key_first, row.key_second, best,
        )  # fmt: skip
        row.id = _best_of(best)
    if row.logprobs:
        logits = padded(row.logits, vocabulary, copy)
        row.largest = likeliest_of(logits, vectors)[0]
        row.mass = mass_of(logits, vectors, row.largest)
        row.own = carray(pointer(logits), (vocabulary,), np.float32)[row.id]


@m.jit
def _best_of(best: int) -> Any:
    values = carray(pointer(best), (m.LANES,), np.float32)
    places = carray(pointer(best + 64), (m.LANES,), np.int32)
    chosen = 0
    for lane in range(1, m.LANES):
        first = values[lane] == values[chosen] and places[lane] < places[chosen]
        if first or values[lane] > values[chosen]:
            chosen = lane
    return places[chosen]


@m.jit
def _sample_rows(call: Any) -> None:
    rows = carray(pointer(call.rows), (call.count,), ROW)
    scratch = call.scratch + team.thread_number() * call.scratch_bytes
    while True:
        index = team.claim(call.counter)
        if index >= call.count:
            break
        _sample_row(call, rows[index], scratch)


@functools.cache
def sampling_entry_point() -> Any:
    """Return the function that threads call; the first call compiles it or reads it from the cache."""
    return compile_entry_point(sample_on_thread)


def sample_on_thread(data: Any) -> None:
    """Sample the rows of one thread of the call at address *data*."""
    call = carray(data, (1,), _CALL)[0]
    try:
        _sample_rows(call)
    except Exception:
        team.fail(call.failures)
    team.finish(call.failures)


class SamplingKernel:
    """Samples rows. It keeps the memory that it needs: it is for one thread at a time.

    vocabulary   number of tokens
    candidates   how many of the likeliest ones filters examine first; changes no result
    threads      most threads that compute
    """

    def __init__(self, vocabulary: int, *, candidates: int, threads: int) -> None:
        self.vocabulary = vocabulary
        self._threads = threads
        self._failures = team.FailureState(threads)
        size = 128 + 6 * 64 * (-(-vocabulary // m.LANES) + 1)
        self._scratch = np.empty(threads * size + 64, np.uint8)
        self._counter = np.zeros(1, np.int64)
        call = self._call = np.zeros(1, _CALL)
        call["vocabulary"], call["candidates"] = vocabulary, candidates
        call["scratch"], call["scratch_bytes"] = -(-m.address(self._scratch) // 64) * 64, size
        call["counter"], call["failures"] = m.address(self._counter), self._failures.address
        self._address = m.address(call)

    def __call__(self, rows: npt.NDArray[Any], work: int) -> None:
        """Sample rows, [rows] ROW, and store the results in them.

        work   how long it takes, in likeliest tokens of a row. Another thread is used only if it is worth
               the time that it takes to wake it
        """
        self._counter[0] = 0
        self._call["rows"], self._call["count"] = m.address(rows), len(rows)
        threads = max(min(self._threads, len(rows), work // WORK_OF_A_THREAD), 1)
        team.run(sampling_entry_point(), self._address, threads, self._failures)
