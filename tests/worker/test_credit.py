"""Several batchers share a worker: what may wait there stays short, and nobody is shut out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.credit import capacity, share

STREAMS = st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=8)


@given(
    max_running=st.integers(1, 256),
    running=st.integers(0, 256),
    waiting=st.integers(0, 256),
    step_tokens=st.integers(1, 4096),
    mean_prompt=st.floats(0, 10_000),
)
def test_what_may_wait_is_about_one_steps_prompts(
    max_running: int, running: int, waiting: int, step_tokens: int, mean_prompt: float
) -> None:
    room = capacity(
        max_running=max_running,
        running=min(running, max_running),
        waiting=waiting,
        step_tokens=step_tokens,
        mean_prompt=mean_prompt,
    )
    slots = min(running, max_running) if waiting and running else max_running

    assert slots + 1 <= room <= slots + max_running
    if mean_prompt:
        assert room - slots <= max(step_tokens / mean_prompt, 1)


@given(room=st.integers(1, 100), streams=STREAMS)
def test_credit_never_falls_below_what_is_here_and_exceeds_the_room_by_reserves_only(
    room: int, streams: list[tuple[int, bool]]
) -> None:
    held, hungry = [have for have, _ in streams], [want for _, want in streams]
    credit = share(room, held, hungry)

    assert all(given >= have for given, have in zip(credit, held, strict=True))
    reserve = max(1, room // (4 * len(streams)))
    assert sum(credit) <= max(room, sum(held)) + reserve * len(streams)


@given(room=st.integers(8, 100), streams=st.integers(2, 8))
def test_whoever_is_idle_can_begin_and_the_hungry_share_evenly(room: int, streams: int) -> None:
    idle_and_hungry = share(room, [0] * streams, [False] + [True] * (streams - 1))

    assert idle_and_hungry[0] >= 1
    assert max(idle_and_hungry[1:]) - min(idle_and_hungry[1:]) <= 1


def test_who_has_less_is_given_first_what_becomes_free() -> None:
    assert share(10, [8, 0], [True, True]) == [8, 2]
    assert share(10, [6, 2], [True, True]) == [6, 4]
