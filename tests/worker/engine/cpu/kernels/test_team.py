"""All threads of a step end it together, even if one of them fails.

Each test is a separate process with a time limit: threads that wait for each other cannot be interrupted.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from headrace.worker.engine.cpu.kernels import team

pytestmark = pytest.mark.skipif(not team.AVAILABLE, reason="without OpenMP there is one thread")

SECONDS = 300  # kernels may have to be compiled first

DECODER = """
import torch
from headrace.worker.engine.flat_step import flatten
from headrace.worker.engine.cpu.kernels.kv_layout import BLOCK
from headrace.worker.engine.cpu.kernels.matmul import ElementType
from tests.worker.engine.cpu.test_decoder import decoder_of, network_of, row

torch.set_num_threads(2)
network = network_of("qwen2")
decoder = decoder_of(network, ElementType.FLOAT32)
"""

ATTENTION_OF_MINUS_INFINITY = (
    DECODER
    + """
for layer in network.model.layers:
    layer.self_attn.q_proj.bias.data.fill_(3e38)
    layer.self_attn.k_proj.bias.data.fill_(-3e38)
decoder = decoder_of(network, ElementType.FLOAT32)
for _ in range(20):
    logits = decoder(flatten([row([1], 0, 1, [0]), row([2], 0, 1, [1])], BLOCK))
    assert not torch.isfinite(logits).all()
print("ended")
"""
)

OUT_OF_BOUNDS = (
    DECODER
    + """
good = flatten([row([1, 2, 3], 0, 3, [0]), row([4, 5], 0, 2, [1])], BLOCK)
expected = decoder(good).clone()
for ids, stop, blocks in (([300], 1, [0]), ([-1], 1, [0]), ([1] * 161, 161, list(range(6))), ([1], 1, [20])):
    try:
        decoder(flatten([row([1, 2, 3], 0, 3, [0]), row(ids, stop - 1, stop, blocks)], BLOCK))
    except IndexError as error:
        print(error)
    else:
        raise AssertionError("computed")
assert torch.equal(decoder(good), expected)
print("ended")
"""
)

ONE_FAILS = """
import numpy as np
from numba import carray, cfunc, njit, types
from headrace.worker.engine.cpu.kernels import team

PHASES = 6

@njit(nogil=True)
def work(failures, who, when):
    for phase in range(PHASES):
        if phase == when and (who == -1 or team.thread_number() == who):
            team.require(failures, 1, 7, 3)
        team.barrier(failures)

def on_thread(data):
    given = carray(data, (3,), np.int64)
    try:
        work(given[0], given[1], given[2])
    except Exception:
        team.fail(given[0])
    team.finish(given[0])

function = cfunc(types.void(types.voidptr), nopython=True)(on_thread)
for who in (0, 1, 2, -1):
    for when in range(PHASES + 1):
        failures = team.FailureState(3)
        given = np.array([failures.address, who, when], np.int64)
        try:
            team.run(function, given.ctypes.data, 3, failures)
        except team.KernelFault as fault:
            assert when < PHASES and "7" in str(fault), fault
        else:
            assert when == PHASES, (who, when)
print("ended")
"""

CHECKED = (
    DECODER
    + """
import numpy as np
from headrace.worker.engine.cpu import decoder as module

module._require_in_range = lambda *_: None  # only the checks of the kernels remain
for ids, stop, blocks in (([300], 1, [0]), ([1] * 161, 161, list(range(6))), ([1], 1, [20])):
    try:
        decoder(flatten([row([1, 2, 3], 0, 3, [0]), row(ids, stop - 1, stop, blocks)], BLOCK))
    except module.team.KernelFault as error:
        print(error)
    else:
        raise AssertionError("computed")
print("ended")
"""
)


def ended(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
    )
    assert done.stdout.endswith("ended\n"), done.stdout + done.stderr
    return done.stdout


def test_scores_of_minus_infinity_make_a_row_that_is_not_finite_and_no_waiting_thread() -> None:
    ended(ATTENTION_OF_MINUS_INFINITY)


def test_a_failed_thread_ends_the_step_for_all_threads() -> None:
    ended(ONE_FAILS)


def test_out_of_range_values_are_rejected_before_the_step() -> None:
    output = ended(OUT_OF_BOUNDS)

    assert output.count("token 300") == output.count("token -1") == 1
    assert output.count("position 160") == output.count("block 20") == 1


def test_kernels_check_their_bounds_if_requested() -> None:
    output = ended(CHECKED, HEADRACE_CHECK_KERNELS="1")

    assert output.count("token 300") == output.count("position 160") == output.count("block 20") == 1
