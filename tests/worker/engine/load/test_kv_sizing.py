"""How the size of KV memory is chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from headrace.worker.engine.load import kv_sizing
from headrace.worker.engine.load.devices import Target
from headrace.worker.engine.load.refusals import LoadingError

MiB = 1 << 20


@given(
    free=st.integers(0, 1 << 36),
    peak=st.integers(0, 1 << 33),
    block=st.integers(1, 1 << 24),
    fewest=st.integers(1, 100),
    rows=st.integers(1, 64),
)
def test_blocks_fit_beside_a_step_and_hold_a_sequence_or_are_rejected(
    free: int, peak: int, block: int, fewest: int, rows: int
) -> None:
    most = fewest * rows
    try:
        blocks = kv_sizing.choose_blocks(
            free=free, peak=peak, share=0.5, block=block, fewest=fewest, most=most
        )
    except LoadingError:
        assert fewest * block > (free - peak) * 0.5
        return

    assert blocks * block <= (free - peak) * 0.5
    assert fewest <= blocks <= most


@given(requested=st.integers(0, 1 << 34), block=st.integers(1, 1 << 24))
def test_the_requested_size_is_used_even_if_less_would_be_enough(requested: int, block: int) -> None:
    assume(requested >= block)

    blocks = kv_sizing.choose_blocks(
        free=1 << 36, peak=0, share=0.1, block=block, fewest=1, most=1, requested=requested
    )

    assert blocks == requested // block


def test_more_than_is_available_is_rejected() -> None:
    with pytest.raises(
        LoadingError, match=r"8\.0 GiB .* were requested, but only 3\.0 GiB are available besides"
    ):
        kv_sizing.choose_blocks(
            free=4 << 30, peak=1 << 30, share=0.5, block=MiB, fewest=1, most=9, requested=8 << 30
        )


def test_without_a_limit_all_the_share_is_used() -> None:
    """What running sequences do not need holds cached prefixes."""
    blocks = kv_sizing.choose_blocks(free=90 * MiB, peak=10 * MiB, share=0.5, block=MiB, fewest=1, most=None)

    assert blocks == 40


def test_the_largest_steps_sample_with_filters_without_and_both() -> None:
    """The sampler has other temporary arrays for each."""
    steps = kv_sizing.largest_steps(step_tokens=50, max_running=4, context_length=100, block_tokens=32)

    assert [{row.params.top_p < 1 for row in rows} for rows in steps] == [{True}, {False}, {True, False}]
    assert [len(rows) for rows in steps] == [4, 4, 4]
    assert max(sum(row.stop - row.start for row in rows) for rows in steps) == 50


@given(
    step_tokens=st.integers(1, 200),
    max_running=st.integers(1, 40),
    context_length=st.integers(1, 150),
    block_tokens=st.sampled_from([4, 32, 256]),
)
def test_the_largest_step_is_as_large_as_a_step_can_be(
    step_tokens: int, max_running: int, context_length: int, block_tokens: int
) -> None:
    rows = kv_sizing.largest_step(
        step_tokens=step_tokens,
        max_running=max_running,
        context_length=context_length,
        block_tokens=block_tokens,
    )

    tokens = sum(row.stop - row.start for row in rows)
    longest = context_length + max_running - 1
    assert tokens == min(max(step_tokens, max_running), longest)
    assert len(rows) == max_running
    assert all(row.sample and row.stop == context_length for row in rows)
    assert all(len(row.blocks) * block_tokens >= row.stop for row in rows)
    assert {block for row in rows for block in row.blocks} <= {0, 1}


def test_a_gpu_has_no_more_places_than_an_int32_can_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_sizing, "free_bytes", lambda _: 1 << 40)
    monkeypatch.setattr(kv_sizing, "peak_bytes", lambda *_: 0)

    blocks = kv_sizing.measure_blocks(
        Target(torch.device("cuda", 0), gpu=True),
        lambda: None,
        block_bytes=64,
        block_tokens=32,
        sequence_blocks=4,
        max_running=2,
        requested=None,
    )

    assert 2**31 - 64 <= (blocks + 1) * 32 < 2**31
