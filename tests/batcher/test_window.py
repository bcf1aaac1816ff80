"""Batches respect their bounds, lose nobody, and never wait for a hungry worker."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.batcher.window import Window

WINDOWS = st.builds(
    Window,
    size=st.integers(1, 8),
    tokens=st.integers(1, 100),
    linger=st.floats(0, 1, allow_nan=False),
)
LENGTHS = st.lists(st.integers(1, 150), min_size=1, max_size=20)


@given(window=WINDOWS, lengths=LENGTHS, room=st.integers(1, 12))
def test_a_batch_is_bounded_by_size_tokens_and_room(window: Window, lengths: list[int], room: int) -> None:
    count = window.count(lengths, room)

    assert 1 <= count <= min(window.size, room, len(lengths))
    assert count == 1 or sum(lengths[:count]) <= window.tokens


@given(window=WINDOWS, lengths=LENGTHS, room=st.integers(1, 12))
def test_a_batch_is_as_large_as_the_bounds_allow(window: Window, lengths: list[int], room: int) -> None:
    count = window.count(lengths, room)

    assert count in (len(lengths), window.size, room) or sum(lengths[: count + 1]) > window.tokens


@given(window=WINDOWS, lengths=LENGTHS, room=st.integers(1, 12), oldest=st.floats(0, 1e6))
def test_nobody_waits_longer_than_the_linger(
    window: Window, lengths: list[int], room: int, oldest: float
) -> None:
    assert window.closes(lengths, room, oldest=oldest, worker_idle=False) <= oldest + window.linger


@given(window=WINDOWS, lengths=LENGTHS, room=st.integers(1, 12), oldest=st.floats(0, 1e6))
def test_an_idle_worker_gets_its_batch_at_once(
    window: Window, lengths: list[int], room: int, oldest: float
) -> None:
    assert window.closes(lengths, room, oldest=oldest, worker_idle=True) == 0


def test_a_full_batch_does_not_linger_and_a_lone_request_does() -> None:
    window = Window(size=2, tokens=10, linger=0.5)

    assert window.closes([1], 8, oldest=100, worker_idle=False) == 100.5
    assert window.closes([1, 1], 8, oldest=100, worker_idle=False) == 0
    assert window.closes([6, 6], 8, oldest=100, worker_idle=False) == 0, "the second does not fit"
