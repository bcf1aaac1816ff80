"""The prefill rate is measured from full steps, by the tokens that they computed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.flow.step_pace import StepPace

STEPS = st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64), st.floats(0.001, 1)), max_size=50)


def test_decodes_beside_a_prompt_do_not_count_as_prompt() -> None:
    pace = StepPace(100)
    pace.record_step(tokens=100, decodes=40, seconds=0.5)

    assert pace.prefill_rate == 120


def test_several_short_prompts_of_one_step_count_in_full() -> None:
    pace = StepPace(100)
    pace.record_step(tokens=100, decodes=0, seconds=0.5)

    assert pace.prefill_rate == 200, (
        "even if each of fifty prompts of two tokens samples its first token in it"
    )


def test_small_steps_are_not_measured() -> None:
    pace = StepPace(100)
    pace.record_step(tokens=5, decodes=0, seconds=0.5)
    pace.record_step(tokens=90, decodes=85, seconds=0.5)

    assert pace.prefill_rate == 0, "unknown"


def test_steps_that_are_half_full_give_a_lower_bound() -> None:
    pace = StepPace(100)
    pace.record_step(tokens=50, decodes=0, seconds=0.5)
    assert pace.prefill_rate == 100
    pace.record_step(tokens=60, decodes=0, seconds=1.0)
    assert pace.prefill_rate == 100
    pace.record_step(tokens=100, decodes=0, seconds=0.5)
    assert 100 < pace.prefill_rate < 200


def test_steps_full_of_decodes_lower_the_rate_only_for_now() -> None:
    pace = StepPace(100)
    pace.record_step(tokens=100, decodes=0, seconds=0.5)
    for _ in range(100):
        pace.record_step(tokens=100, decodes=99, seconds=0.5)
    assert pace.prefill_rate == 25, "an eighth of what empty steps compute"
    pace.record_step(tokens=1, decodes=1, seconds=0.1)
    assert pace.prefill_rate == 198


@given(steps=STEPS)
def test_the_rate_never_exceeds_that_of_any_step(steps: list[tuple[int, int, float]]) -> None:
    pace = StepPace(64)
    rates = [0.0]
    for prompts, decodes, seconds in steps:
        pace.record_step(tokens=prompts + decodes, decodes=decodes, seconds=seconds)
        rates.append((prompts + decodes) / seconds)
        assert pace.prefill_rate <= max(rates) * (1 + 1e-9)


def test_prompt_length_and_step_time_are_running_means() -> None:
    pace = StepPace(64)
    pace.record_submission(200)
    pace.record_submission(100)
    pace.record_step(tokens=1, decodes=1, seconds=1.0)

    assert (pace.prompt_tokens, pace.seconds) == (190, 1.0)


def test_one_stall_hardly_changes_the_step_time_and_slower_steps_do() -> None:
    pace = StepPace(64)
    for seconds in (0.01, 0.01, 60.0):
        pace.record_step(tokens=1, decodes=1, seconds=seconds)
    assert pace.seconds < 0.02

    for _ in range(60):
        pace.record_step(tokens=1, decodes=1, seconds=1.0)
    assert pace.seconds > 0.9
