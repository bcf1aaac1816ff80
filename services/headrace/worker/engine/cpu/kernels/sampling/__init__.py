"""Sample the next token of rows of logits: maximum, filters, noise and argmax, one thread per row.

`worker.engine.sampling` describes the result; it also applies penalties and biases before. Filters leave the
tokens whose score is at least a least score: it is found by bisection over the bits of float32, first over
all tokens for the few likeliest ones, then over those, and over all tokens again if they do not suffice.
"""

from __future__ import annotations

import functools
from functools import partial
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

_CHUNK = 64  # vectors
_FLAGS = ir.VectorType(ir.IntType(1), m.LANES)
_INFINITY_BITS = 0x7F800000


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
        m.store(b, offset(b, out, i, 64), _scaled(b, x, i, largest, temperature))
        return []

    m.counted_loop(b, vectors, [], body)


def _scaled(b: Any, x: Any, i: Any, largest: Any, temperature: Any) -> Any:
    value = b.fsub(m.load(b, offset(b, x, i, 64), m.FLOATS), m.splat(b, largest))
    return b.fdiv(value, m.splat(b, temperature))


@m.intrinsic([_i8, _i8, _f4], _i8)
def mass_of(b: Any, x: Any, vectors: Any, largest: Any) -> Any:
    """Return the sum of the weights of x - largest."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        value = b.fsub(m.load(b, offset(b, x, i, 64), m.FLOATS), m.splat(b, largest))
        return [b.add(carried[0], vector_math.weight(b, value))]

    return m.reduce(b, m.counted_loop(b, vectors, [_no_weights()], body)[0], b.add)


@m.intrinsic([_i8, _i8, _i8])
def _weigh(b: Any, x: Any, vectors: Any, out: Any) -> None:
    """Store the weights of x in out."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        m.store(b, offset(b, out, i, 128), vector_math.weight(b, m.load(b, offset(b, x, i, 64), m.FLOATS)), 8)
        return []

    m.counted_loop(b, vectors, [], body)


def _no_weights() -> Any:
    return ir.Constant(vector_math.WEIGHTS, [0] * m.LANES)


@m.intrinsic([_i8, _i8, _f4], _i8)
def _count_from(b: Any, x: Any, vectors: Any, least: Any) -> Any:
    """Return how many numbers of x are at least *least*."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        within = b.fcmp_ordered(">=", m.load(b, offset(b, x, i, 64), m.FLOATS), m.splat(b, least))
        return [b.sub(carried[0], b.sext(within, m.INTS))]

    return b.sext(m.reduce(b, m.counted_loop(b, vectors, [m.ints(0)], body)[0], b.add), m.I64)


@m.intrinsic([_i8, _i8, _i8, _f4], _i8)
def _mass_from(b: Any, x: Any, weights: Any, vectors: Any, least: Any) -> Any:
    """Return the sum of the weights of the numbers of x that are at least *least*."""

    def body(i: Any, carried: list[Any]) -> list[Any]:
        within = b.fcmp_ordered(">=", m.load(b, offset(b, x, i, 64), m.FLOATS), m.splat(b, least))
        weight = m.load(b, offset(b, weights, i, 128), vector_math.WEIGHTS, 8)
        return [b.add(carried[0], b.select(within, weight, _no_weights()))]

    return m.reduce(b, m.counted_loop(b, vectors, [_no_weights()], body)[0], b.add)


def _draw(
    listed: bool, b: Any, x: Any, ids: Any, vectors: Any, largest: Any, temperature: Any, least: Any,
    key_first: Any, key_second: Any, best: Any,
) -> None:  # fmt: skip
    """Find the token with the greatest score plus noise among those with a score of at least *least*.

    listed   if true, x has scores of the tokens *ids*; else logits of all tokens, and scores are
             (x - largest) / temperature
    best     address of [16] float32 and then [16] int32: receives the best of each lane, and its token
    """
    firsts, seconds = (m.splat(b, b.trunc(key, m.I32)) for key in (key_first, key_second))
    lanes = ir.Constant(m.INTS, list(range(m.LANES)))

    def body(i: Any, carried: list[Any]) -> list[Any]:
        highest, places = carried
        if listed:
            score = m.load(b, offset(b, x, i, 64), m.FLOATS)
            place = m.load(b, offset(b, ids, i, 64), m.INTS)
        else:
            score = _scaled(b, x, i, largest, temperature)
            place = b.add(lanes, m.splat(b, b.trunc(b.mul(i, integer(m.LANES)), m.I32)))
        noisy = b.fadd(score, vector_math.gumbel(b, place, firsts, seconds))
        kept = b.fcmp_ordered(">=", score, m.splat(b, least))
        better = b.and_(kept, b.fcmp_ordered(">", noisy, highest))
        return [b.select(better, noisy, highest), b.select(better, place, places)]

    initial = [m.floats(float("-inf")), m.ints(0)]
    highest, places = m.counted_loop(b, vectors, initial, body)
    m.store(b, best, highest)
    m.store(b, b.add(best, integer(64)), places)


_DRAW = [_i8, _i8, _i8, _f4, _f4, _f4, _i8, _i8, _i8]
_draw_all = m.make_intrinsic(_DRAW, partial(_draw, False))
_draw_listed = m.make_intrinsic(_DRAW, partial(_draw, True))


@m.intrinsic([_i8], _f4)
def _score_of(b: Any, bits: Any) -> Any:
    """Return the score, 0 or negative, whose absolute value has these bits."""
    negative = b.or_(b.trunc(bits, m.I32), ir.Constant(m.I32, -(1 << 31)))
    return b.bitcast(negative, m.F32)


@m.jit
def _kth(x: int, vectors: int, k: int) -> Any:
    """Return the k-th greatest of the scores x, which are at least k."""
    low = 0
    for bit in range(30, -1, -1):
        if _count_from(x, vectors, _score_of(min(low + (1 << bit) - 1, _INFINITY_BITS))) < k:
            low += 1 << bit
    return _score_of(low)


@m.jit
def _least_of_mass(x: int, weights: int, vectors: int, target: float) -> Any:
    """Return the greatest score such that the scores which reach it have the mass *target*; all have it."""
    low = 0
    for bit in range(30, -1, -1):
        least = _score_of(min(low + (1 << bit) - 1, _INFINITY_BITS))
        if float(_mass_from(x, weights, vectors, least)) < target:
            low += 1 << bit
    return _score_of(low)


@m.jit
def _least(x: int, weights: int, count: int, top_k: int, top_p: float, total: int) -> Any:
    """Return the least score that top-k and top-p keep; NaN if the *count* scores x do not suffice to know.

    x         scores, followed by -inf up to a multiple of 16
    weights   of x
    total     mass of all scores, if top_k is 0
    """
    vectors = (count + m.LANES - 1) // m.LANES
    least = np.float32(-np.inf)
    if top_k > 0:
        if count < top_k:
            return np.float32(np.nan)
        least = _kth(x, vectors, top_k)
        total = _mass_from(x, weights, vectors, least)
    if top_p < 1:
        target = top_p * float(total)
        if float(_mass_from(x, weights, vectors, np.float32(-np.inf))) < target:
            return np.float32(np.nan)
        least = max(least, _least_of_mass(x, weights, vectors, target))
    return least


@m.jit
def _few_likeliest(x: int, vectors: int, most: int) -> Any:
    """Return a score which about, and at most, *most* scores of x reach; NaN if there is none."""
    low = 0
    for bit in range(30, -1, -1):
        if low + (1 << bit) > _INFINITY_BITS:
            continue
        count = _count_from(x, vectors, _score_of(low + (1 << bit)))
        if count <= most:
            low += 1 << bit
            if 2 * count >= most:
                break
    least = _score_of(low)
    return least if _count_from(x, vectors, least) <= most else np.float32(np.nan)


@m.jit
def _collect(x: int, vectors: int, least: float, found: int, ids: int) -> int:
    """Copy the scores of at least *least*, and their tokens; return how many. Pads with -inf and token 0."""
    scores = carray(pointer(x), (vectors * m.LANES,), np.float32)
    room = scores.size + m.LANES
    out = carray(pointer(found), (room,), np.float32)
    tokens = carray(pointer(ids), (room,), np.int32)
    count = 0
    for vector in range(vectors):
        if vector_maximum(x + 64 * vector, 1) >= least:
            for place in range(vector * m.LANES, (vector + 1) * m.LANES):
                if scores[place] >= least:
                    out[count] = scores[place]
                    tokens[count] = place
                    count += 1
    for place in range(count, (count + m.LANES - 1) // m.LANES * m.LANES):
        out[place], tokens[place] = np.float32(-np.inf), 0
    return count


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
        if top_k == 0 and row.top_p >= 1:
            _draw_all(
                scores, 0, vectors, largest, row.temperature, row.min_p_log,
                row.key_first, row.key_second, best,
            )  # fmt: skip
        else:
            _scale(scores, vectors, largest, row.temperature, scaled)
            total = 0 if top_k > 0 else mass_of(scaled, vectors, zero)
            least = np.float32(np.nan)
            count = 0
            few = _few_likeliest(scaled, vectors, call.candidates)
            if not np.isnan(few):
                count = _collect(scaled, vectors, few, found, ids)
                _weigh(found, (count + m.LANES - 1) // m.LANES, weights)
                least = _least(found, weights, count, top_k, np.float64(row.top_p), total)
            if np.isnan(least):
                _weigh(scaled, vectors, weights)
                least = _least(scaled, weights, vocabulary, top_k, np.float64(row.top_p), total)
                count = _collect(scaled, vectors, max(least, row.min_p_log), found, ids)
            _draw_listed(
                found, ids, (count + m.LANES - 1) // m.LANES, zero, zero, max(least, row.min_p_log),
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

    def __call__(self, rows: npt.NDArray[Any]) -> None:
        """Sample rows, [rows] ROW, and store the results in them."""
        self._counter[0] = 0
        self._call["rows"], self._call["count"] = m.address(rows), len(rows)
        team.run(sampling_entry_point(), self._address, min(self._threads, len(rows)), self._failures)
