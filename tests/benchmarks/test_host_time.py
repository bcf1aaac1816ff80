"""The benchmark of the host's time per step, with a few short sequences."""

from __future__ import annotations

import pytest

from benchmarks.host_time import measure


@pytest.mark.parametrize("ahead", [0, 1])
def test_each_full_decode_step_is_measured(ahead: int) -> None:
    spent = measure(3, 20, ahead=ahead)

    assert 10 < len(spent) <= 20, "the first and the last steps are not full"
    assert all(one.cpu > 0 and one.wall > 0 for one in spent)
