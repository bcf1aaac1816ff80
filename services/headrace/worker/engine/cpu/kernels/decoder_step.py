"""Compute one step of a Llama-like decoder, from token ids to logits, in one call.

All threads run the same function. Between two barriers they take work items (a row, a panel of a matrix, a
tile of attention) from a shared counter, so that a thread that the system preempts delays one item and not a
fixed share of the work. The residual stream, norms, rotation, softmax and activation are float32;
`matmul.ElementType` is the format of the products.

    x += output(attention(rotate(qkv(norm(x)))))
    x += down(silu(gate(norm(x))) * up(norm(x)))
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, types

from headrace.worker.engine.cpu.kernels import machine, team
from headrace.worker.engine.cpu.kernels.attend import attend_unit, work_units
from headrace.worker.engine.cpu.kernels.cache import compile_entry_point
from headrace.worker.engine.cpu.kernels.elementwise import (
    copy_row,
    pack_row,
    pointer,
    rotate_vector,
    scale_row,
    silu_row,
    sum_of_squares,
    widen_row,
)
from headrace.worker.engine.cpu.kernels.kv_layout import LAYER, RAGGED, prefetch_token, store_token
from headrace.worker.engine.cpu.kernels.matmul import GROUP, MATRIX, multiply_panel

PHASES = 10  # per layer, each with its own counter
COUNTER_BYTES = team.CACHE_LINE
GATED_ROWS = 64  # rows of gates, and of as many numbers to be gated, that one thread holds
GATED_BYTES = 2 * 4 * GROUP  # of each of these rows
STORE, ADD, GATE = range(3)  # what a product does with its results, see `_multiply`
MOST_TOKENS = 16  # that one thread takes at once, to rotate and store them

# One decoder layer: addresses of float32 vectors, and records of `matmul` and `kv_layout`.
DECODER_LAYER = np.dtype(
    [
        ("attention_norm", np.int64),
        ("feed_forward_norm", np.int64),
        ("query_norm", np.int64),  # 0 where the model has none
        ("key_norm", np.int64),
        ("qkv", MATRIX),
        ("output", MATRIX),
        ("gate_up", MATRIX),  # gates first
        ("down", MATRIX),
        ("attention", LAYER),
    ]
)

STEP = np.dtype(
    [
        # the model
        ("element_type", np.int64),  # matmul.ElementType
        ("layers", np.int64),  # 0 to compute only logits, from the residual stream that the last step left
        ("layer_table", np.int64),  # address of [layers] DECODER_LAYER
        ("hidden", np.int64),  # a multiple of 32
        ("intermediate", np.int64),  # a multiple of 16
        ("epsilon", np.float32),
        ("embedding", np.int64),  # address of [vocabulary, hidden]
        ("embedding_half", np.int64),  # 1 for bfloat16, 0 for float32
        ("final_norm", np.int64),
        ("head", MATRIX),
        ("vocabulary", np.int64),
        ("positions", np.int64),
        ("cosines", np.int64),  # address of [positions, head_dim / 2] float32
        ("sines", np.int64),
        # the step
        ("ragged", RAGGED),
        ("ids", np.int64),  # address of [tokens] int32
        ("sampled", np.int64),  # number of tokens that need logits
        ("sampled_tokens", np.int64),  # address of [sampled] int32, indices into the step's tokens
        ("logits", np.int64),  # address of [sampled, head.count x 32] float32
        # scratch memory
        ("residual", np.int64),  # [tokens, hidden] float32
        ("activations", np.int64),  # [tokens, longest row], in the format of `matmul`
        ("scales", np.int64),  # [tokens, groups of the longest row] float32
        ("gated", np.int64),  # [tokens, intermediate], in the format of `matmul`
        ("gated_scales", np.int64),  # [tokens, groups] float32
        ("projected", np.int64),  # [tokens, widest result of qkv or gate_up] float32
        ("attended", np.int64),  # [tokens, heads x head_dim] float32
        ("failures", np.int64),  # address of a `team.FailureState`
        ("counters", np.int64),  # zeros: (layers x PHASES + 1) x COUNTER_BYTES
        ("scratch", np.int64),  # per thread
        ("scratch_bytes", np.int64),
        ("cycles", np.int64),  # address of [len(PARTS) + 1] int64 for the cycles of thread 0, or 0
    ]
)

# The parts that `cycles` counts; "gate and up" includes the activation where groups divide a row. The last
# entry of `cycles` is the time at which the last part ended.
PARTS = (
    "embedding", "attention norm", "qkv", "rotation and store", "attention", "pack", "output",
    "feed-forward norm", "gate and up", "activation", "down", "head",
)  # fmt: skip
_LAST = len(PARTS)  # index of this time


@machine.intrinsic([], types.int64)
def _cycle_counter(b: Any) -> Any:
    """Return the cycle counter of the processor."""
    return machine.call(b, "llvm.readcyclecounter", result=machine.I64)


@machine.jit
def _count_cycles(step: Any, part: int) -> None:
    """Add the cycles since the end of the previous part to this part, if cycles are counted."""
    if step.cycles and team.thread_number() == 0:
        cycles = carray(pointer(step.cycles), (_LAST + 1,), np.int64)
        now = _cycle_counter()
        cycles[part] += now - cycles[_LAST]
        cycles[_LAST] = now


@machine.jit
def _multiply(
    step: Any, part: int, phase: int, what: int, matrix: Any, rows: int, a: int, a_scales: int, out: int,
    out_row: int,
) -> None:  # fmt: skip
    """Multiply activations by a matrix; threads share its panels.

    what   STORE results, or ADD them to existing values. To GATE, *matrix* is gate_up, and threads share
           groups of GROUP results of the activation. A thread computes all of a group, and holds its factors
           for some rows in its own scratch memory, at *out*: cores exchange activations, which have an
           eighth of the bytes. One function for all: each call of `multiply_panel` takes long to compile
    """
    counter = step.counters + COUNTER_BYTES * phase
    gate = what == GATE
    groups = matrix.count // 4
    items, each, most = (groups, 4, GATED_ROWS) if gate else (matrix.count, 1, rows)
    a_row, scales_row = 4 * matrix.words, matrix.words // (GROUP // 4) * 4
    item = team.claim(counter)
    while item < items:
        following = team.claim(counter)
        coming = 2 * following if gate else following
        if following >= items:
            coming = matrix.count
        for begin in range(0, rows, most):
            some = min(rows - begin, most)
            for i in range(each):
                panel, ahead, place = item, coming, out + 128 * item
                if gate:  # two panels of gates, then two of numbers to be gated
                    panel = 2 * item + i % 2 + i // 2 * 2 * groups
                    place = out + 128 * i
                    if i < 3:
                        ahead = 2 * item + (i + 1) % 2 + (i + 1) // 2 * 2 * groups
                    elif begin + some < rows:
                        ahead = matrix.count
                multiply_panel(
                    step.element_type,
                    what == ADD,
                    matrix,
                    panel,
                    ahead,
                    some,
                    a + begin * a_row,
                    a_scales + begin * scales_row,
                    place,
                    out_row,
                )
            if gate:
                for row in range(some):
                    gates = out + row * out_row
                    _activate(step, gates, gates, GROUP, begin + row, item)
        item = following
    team.barrier(step.failures)
    _count_cycles(step, part)


@machine.jit
def _activate(step: Any, gates: int, scratch: int, length: int, row: int, part: int) -> None:
    """Store the activation of some numbers of a row, which follow their gates; they are part *part* of it."""
    silu_row(gates, gates + 4 * length, length // 16, scratch)
    at = row * step.intermediate + part * length
    scales = step.gated_scales + 4 * (row * (step.intermediate // GROUP) + part)
    pack_row(step.element_type, scratch, length, step.gated + at * _element_bytes(step), scales)


@machine.jit
def _normalise(step: Any, x: int, weights: int, row: int, scratch: int) -> None:
    """Store the RMS norm of one row (Zhang & Sennrich, 2019) as activations of the next product."""
    vectors = step.hidden // 16
    mean = sum_of_squares(x, vectors) / np.float32(step.hidden)
    factor = np.float32(1.0) / np.sqrt(np.float32(mean + step.epsilon))
    scale_row(x, factor, weights, vectors, scratch)
    _pack(step, scratch, step.hidden, row, step.activations, step.scales)


@machine.jit
def _normalise_all(step: Any, part: int, phase: int, weights: int, scratch: int) -> None:
    """Store the norms of all rows as activations; threads share the rows."""
    counter = step.counters + COUNTER_BYTES * phase
    row = team.claim(counter)
    while row < step.ragged.tokens:
        _normalise(step, step.residual + 4 * step.hidden * row, weights, row, scratch)
        row = team.claim(counter)
    team.barrier(step.failures)
    _count_cycles(step, part)


@machine.jit
def _element_bytes(step: Any) -> int:
    return 1 if step.element_type == 0 else (2 if step.element_type == 1 else 4)


@machine.jit
def _pack(step: Any, x: int, length: int, row: int, out: int, scales: int) -> None:
    """Store one row of floats as activations of a product."""
    place = out + row * length * _element_bytes(step)
    pack_row(step.element_type, x, length, place, scales + 4 * row * (length // GROUP))


@machine.jit
def _rotate(step: Any, layer: Any, token: int, row: int) -> None:
    """Apply rope to the queries and keys of a token (Su et al., RoFormer, 2021), after their norm if any."""
    own = layer.attention
    dim = own.head_dim
    half = dim // 2
    positions = carray(pointer(step.ragged.positions), (step.ragged.tokens,), np.int32)
    if machine.CHECKED:
        team.require(step.failures, team.POSITION, positions[token], step.positions)
    at = 4 * half * np.int64(positions[token])
    cosines = carray(pointer(step.cosines + at), (half,), np.float32)
    sines = carray(pointer(step.sines + at), (half,), np.float32)
    for head in range(own.heads + own.kv_heads):
        place = row + 4 * dim * head
        vector = carray(pointer(place), (dim,), np.float32)
        norm = layer.query_norm if head < own.heads else layer.key_norm
        if norm != 0:
            weights = carray(pointer(norm), (dim,), np.float32)
            total = np.float32(0.0)
            for d in range(dim):
                total += vector[d] * vector[d]
            factor = np.float32(1.0) / np.sqrt(np.float32(total / np.float32(dim) + step.epsilon))
            for d in range(dim):
                vector[d] = vector[d] * factor * weights[d]
        if half % 16 == 0:
            rotate_vector(place, step.cosines + at, step.sines + at, half // 16)
            continue
        for d in range(half):
            left, right = vector[d], vector[d + half]
            vector[d] = left * cosines[d] - right * sines[d]
            vector[d + half] = right * cosines[d] + left * sines[d]


@machine.jit
def _attention(step: Any, layer: Any, phase: int, scratch: int) -> None:
    """Compute attention, with its projections, and add the result to the residual stream."""
    own = layer.attention
    tokens = step.ragged.tokens
    residual_row = 4 * step.hidden
    _normalise_all(step, 1, phase, layer.attention_norm, scratch)
    projected_row = 128 * layer.qkv.count
    a, a_scales = step.activations, step.scales
    _multiply(step, 2, phase + 1, STORE, layer.qkv, tokens, a, a_scales, step.projected, projected_row)
    keys = 4 * own.heads * own.head_dim
    values = keys + 4 * own.kv_heads * own.head_dim
    counter = step.counters + COUNTER_BYTES * (phase + 2)
    # Neighbouring tokens write the same cache lines, so one thread takes some of them.
    some = min(MOST_TOKENS, max(1, tokens // (8 * team.thread_count())))
    row = some * team.claim(counter)
    while row < tokens:
        following = some * team.claim(counter)
        for token in range(row, min(row + some, tokens)):
            next_token = token + 1 if token + 1 < row + some else following
            if next_token < tokens:
                prefetch_token(own, step.ragged, next_token)
            start = step.projected + token * projected_row
            _rotate(step, layer, token, start)
            store_token(step.failures, own, step.ragged, token, start + keys, start + values, own.value_dim)
        row = following
    team.barrier(step.failures)
    _count_cycles(step, 3)
    width = own.heads * own.value_dim
    counter = step.counters + COUNTER_BYTES * (phase + 3)
    items = work_units(own, step.ragged)
    unit = team.claim(counter)
    while unit < items:
        following = team.claim(counter)
        attend_unit(
            step.failures,
            own,
            step.ragged,
            unit,
            following,
            step.projected,
            projected_row,
            step.attended,
            4 * width,
            scratch,
        )
        unit = following
    team.barrier(step.failures)
    _count_cycles(step, 4)
    counter = step.counters + COUNTER_BYTES * (phase + 4)
    row = team.claim(counter)
    while row < tokens:
        _pack(step, step.attended + 4 * width * row, width, row, a, a_scales)
        row = team.claim(counter)
    team.barrier(step.failures)
    _count_cycles(step, 5)
    _multiply(step, 6, phase + 5, ADD, layer.output, tokens, a, a_scales, step.residual, residual_row)


@machine.jit
def _feed_forward(step: Any, layer: Any, phase: int, scratch: int) -> None:
    """Compute the gated feed-forward network (Shazeer, GLU Variants, 2020), and add its result."""
    tokens = step.ragged.tokens
    _normalise_all(step, 7, phase, layer.feed_forward_norm, scratch)
    groups = step.intermediate % GROUP == 0
    row_bytes = GATED_BYTES if groups else 128 * layer.gate_up.count
    out, what = (scratch, GATE) if groups else (step.projected, STORE)
    a, a_scales = step.activations, step.scales
    _multiply(step, 8, phase + 1, what, layer.gate_up, tokens, a, a_scales, out, row_bytes)
    if not groups:
        counter = step.counters + COUNTER_BYTES * (phase + 2)
        row = team.claim(counter)
        while row < tokens:
            _activate(step, out + row * row_bytes, scratch, step.intermediate, row, 0)
            row = team.claim(counter)
        team.barrier(step.failures)
        _count_cycles(step, 9)
    a, a_scales = step.gated, step.gated_scales
    _multiply(step, 10, phase + 3, ADD, layer.down, tokens, a, a_scales, step.residual, 4 * step.hidden)


@machine.jit
def _decoder_step(step: Any) -> None:
    me, threads = team.thread_number(), team.thread_count()
    scratch = step.scratch + me * step.scratch_bytes
    tokens, hidden = step.ragged.tokens, step.hidden
    ids = carray(pointer(step.ids), (tokens,), np.int32)
    embedded = tokens if step.layers else 0
    for row in range(me * embedded // threads, (me + 1) * embedded // threads):
        if machine.CHECKED:
            team.require(step.failures, team.TOKEN, ids[row], step.vocabulary)
        if step.embedding_half:
            source = step.embedding + 2 * hidden * np.int64(ids[row])
            widen_row(source, hidden // 16, step.residual + 4 * hidden * row)
        else:
            source = step.embedding + 4 * hidden * np.int64(ids[row])
            copy_row(source, hidden // 16, step.residual + 4 * hidden * row)
    team.barrier(step.failures)
    _count_cycles(step, 0)
    layers = carray(pointer(step.layer_table), (step.layers,), DECODER_LAYER)
    phase = 0
    for index in range(step.layers):
        _attention(step, layers[index], phase, scratch)
        _feed_forward(step, layers[index], phase + 6, scratch)
        phase += PHASES
    sampled = carray(pointer(step.sampled_tokens), (step.sampled,), np.int32)
    for row in range(me * step.sampled // threads, (me + 1) * step.sampled // threads):
        if machine.CHECKED:
            team.require(step.failures, team.SAMPLED, sampled[row], tokens)
        _normalise(step, step.residual + 4 * hidden * np.int64(sampled[row]), step.final_norm, row, scratch)
    team.barrier(step.failures)
    if step.sampled:
        a, a_scales, row_bytes = step.activations, step.scales, 128 * step.head.count
        _multiply(step, 11, phase, STORE, step.head, step.sampled, a, a_scales, step.logits, row_bytes)


@functools.cache
def step_entry_point() -> Any:
    """Return the function that threads call; the first call compiles it or reads it from the cache."""
    return compile_entry_point(run_on_thread)


def run_on_thread(data: Any) -> None:
    """Compute the share of one thread of the step at address *data*."""
    step = carray(data, (1,), STEP)[0]
    try:
        _decoder_step(step)
    except Exception:
        team.fail(step.failures)
    team.finish(step.failures)


def run_step(step: Any, threads: int, failures: team.FailureState) -> None:
    """Compute the step that a STEP record describes, on *threads* threads. Raises `team.KernelFault`.

    failures   for as many threads
    """
    step["failures"] = failures.address
    team.run(step_entry_point(), machine.address(step), threads, failures)
