"""Find the most likely tokens of rows of logits, and what their log-probabilities are computed from.

One thread per row. The sums are those of sampling, equal in every bit.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from headrace.worker.engine.cpu.kernels import machine as m
from headrace.worker.engine.cpu.kernels import team
from headrace.worker.engine.cpu.kernels.cache import compile_entry_point
from headrace.worker.engine.cpu.kernels.elementwise import pointer
from headrace.worker.engine.cpu.kernels.sampling import likeliest_of, padded, vector_maximum
from headrace.worker.engine.cpu.kernels.sampling.filtering import mass_of

LIKELIHOOD = np.dtype(
    [
        ("logits", np.int64),  # address of [vocabulary] float32
        ("id", np.int64),  # the token whose logit is wanted
        ("top_ids", np.int64),  # address of [most] int32: receives the most likely tokens, most likely first
        ("top_logits", np.int64),  # address of [most] float32
        # Results:
        ("finite", np.int32),  # whether the greatest logit is finite; else there are no other results
        ("largest", np.float32),
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
        ("most", np.int64),  # how many of the most likely tokens are wanted; at most *vocabulary*
        ("scratch", np.int64),
        ("scratch_bytes", np.int64),  # of each thread
        ("counter", np.int64),
        ("failures", np.int64),  # address of a `team.FailureState`
    ]
)

_CHUNK = 16  # vectors


@m.jit
def _insert(ids: Any, logits: Any, count: int, id: int, logit: float) -> None:
    """Insert a token into the *count* most likely ones before it, in their order; the last one drops out."""
    place = count
    while place > 0 and logits[place - 1] < logit:
        if place < len(ids):
            ids[place], logits[place] = ids[place - 1], logits[place - 1]
        place -= 1
    ids[place], logits[place] = id, logit


@m.jit
def _find_top(x: int, vocabulary: int, ids: Any, logits: Any) -> None:
    """Fill ids and logits with the most likely tokens. Of equal ones, those with the smallest ids."""
    most, count = len(ids), 0
    vectors = (vocabulary + m.LANES - 1) // m.LANES
    numbers = carray(pointer(x), (vocabulary,), np.float32)
    for first in range(0, vectors, _CHUNK):
        after = min(first + _CHUNK, vectors)
        # Tokens come by id: one that is only as likely as the last one does not replace it.
        if count == most and vector_maximum(x + 64 * first, after - first) <= logits[most - 1]:
            continue
        for vector in range(first, after):
            if count == most and vector_maximum(x + 64 * vector, 1) <= logits[most - 1]:
                continue
            for id in range(vector * m.LANES, min((vector + 1) * m.LANES, vocabulary)):
                if count < most or numbers[id] > logits[most - 1]:
                    _insert(ids, logits, count, id, numbers[id])
                    count = min(count + 1, most)


@m.jit
def _compute_row(call: Any, row: Any, scratch: int) -> None:
    vocabulary = call.vocabulary
    vectors = (vocabulary + m.LANES - 1) // m.LANES
    logits = padded(row.logits, vocabulary, scratch)
    row.largest, _ = likeliest_of(logits, vectors)
    row.finite = np.isfinite(row.largest)
    if not row.finite:
        return
    row.mass = mass_of(logits, vectors, row.largest)
    row.own = carray(pointer(logits), (vocabulary,), np.float32)[row.id]
    if call.most > 0:
        _find_top(
            logits,
            vocabulary,
            carray(pointer(row.top_ids), (call.most,), np.int32),
            carray(pointer(row.top_logits), (call.most,), np.float32),
        )


@m.jit
def _compute_rows(call: Any) -> None:
    rows = carray(pointer(call.rows), (call.count,), LIKELIHOOD)
    scratch = call.scratch + team.thread_number() * call.scratch_bytes
    while True:
        index = team.claim(call.counter)
        if index >= call.count:
            break
        _compute_row(call, rows[index], scratch)


@functools.cache
def likelihood_entry_point() -> Any:
    """Return the function that threads call; the first call compiles it or reads it from the cache."""
    return compile_entry_point(likelihood_on_thread)


def likelihood_on_thread(data: Any) -> None:
    """Compute the rows of one thread of the call at address *data*."""
    call = carray(data, (1,), _CALL)[0]
    try:
        _compute_rows(call)
    except Exception:
        team.fail(call.failures)
    team.finish(call.failures)


def compute_likelihoods(rows: npt.NDArray[Any], vocabulary: int, *, most: int, threads: int) -> None:
    """Compute the rows, and store the results in them.

    rows   [rows] LIKELIHOOD, with ids below *vocabulary*
    most   how many of the most likely tokens are wanted, 0 to *vocabulary*
    """
    threads = max(min(threads, len(rows)), 1)
    size = 64 * (-(-vocabulary // m.LANES) + 1)
    scratch = np.empty(threads * size + 64, np.uint8)
    counter = np.zeros(1, np.int64)
    call = np.zeros(1, _CALL)
    call["rows"], call["count"], call["vocabulary"] = m.address(rows), len(rows), vocabulary
    call["most"] = most
    call["scratch"], call["scratch_bytes"] = -(-m.address(scratch) // 64) * 64, size
    call["counter"] = m.address(counter)
    failures = team.FailureState(threads)
    call["failures"] = failures.address
    team.run(likelihood_entry_point(), m.address(call), threads, failures)
