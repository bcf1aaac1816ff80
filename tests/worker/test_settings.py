"""The worker's settings whose defaults depend on the device."""

from __future__ import annotations

import pytest

from headrace.worker.settings import Settings


@pytest.mark.parametrize(
    ("device", "sequences", "tokens"), [("cpu", 32, 256), ("cuda", 256, 2048), ("cuda:1", 256, 2048)]
)
def test_a_gpu_computes_more_sequences_and_tokens_at_a_time(device: str, sequences: int, tokens: int) -> None:
    settings = Settings(model="m", device=device)

    assert (settings.running_sequences, settings.tokens_per_step) == (sequences, tokens)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_limits_that_are_set_hold_on_every_device(device: str) -> None:
    settings = Settings(model="m", device=device, max_running=7, step_tokens=99)

    assert (settings.running_sequences, settings.tokens_per_step) == (7, 99)


def test_exact_results_are_off_by_default() -> None:
    assert not Settings(model="m").exact
