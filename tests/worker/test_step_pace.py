"""How fast prompts are computed is told by full steps, and counted in what they computed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.step_pace import StepPace

STEPS = st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64), st.floats(0.001, 1)), max_size=50)


def test_decodes_beside_a_prompt_do_not_count_as_prompt() -> None:
    pace = StepPace(100)
    pace.stepped(tokens=100, decodes=40, seconds=0.5)

    assert pace.prefill == 120


def test_several_short_prompts_of_one_step_count_whole() -> None:
    pace = StepPace(100)
    pace.stepped(tokens=100, decodes=0, seconds=0.5)

    assert pace.prefill == 200, "though each of fifty prompts of two tokens draws its first token in it"


def test_small_prompts_say_nothing_of_how_fast_large_ones_are_computed() -> None:
    pace = StepPace(100)
    pace.stepped(tokens=5, decodes=0, seconds=0.5)
    pace.stepped(tokens=90, decodes=85, seconds=0.5)

    assert pace.prefill == 0, "unknown"


def test_steps_that_are_half_full_say_how_fast_it_is_at_least() -> None:
    pace = StepPace(100)
    pace.stepped(tokens=50, decodes=0, seconds=0.5)
    assert pace.prefill == 100
    pace.stepped(tokens=60, decodes=0, seconds=1.0)
    assert pace.prefill == 100
    pace.stepped(tokens=100, decodes=0, seconds=0.5)
    assert 100 < pace.prefill < 200


def test_a_house_full_of_decodes_does_not_make_prompts_look_slow_for_later() -> None:
    pace = StepPace(100)
    pace.stepped(tokens=100, decodes=0, seconds=0.5)
    for _ in range(100):
        pace.stepped(tokens=100, decodes=99, seconds=0.5)
    assert pace.prefill == 25, "an eighth of what empty steps compute"
    pace.stepped(tokens=1, decodes=1, seconds=0.1)
    assert pace.prefill == 198


@given(steps=STEPS)
def test_no_rate_is_told_that_no_step_had(steps: list[tuple[int, int, float]]) -> None:
    pace = StepPace(64)
    rates = [0.0]
    for prompts, decodes, seconds in steps:
        pace.stepped(tokens=prompts + decodes, decodes=decodes, seconds=seconds)
        rates.append((prompts + decodes) / seconds)
        assert pace.prefill <= max(rates) * (1 + 1e-9)


def test_the_usual_prompt_and_step_are_running_means_from_the_first_on() -> None:
    pace = StepPace(64)
    pace.submitted(200)
    pace.submitted(100)
    pace.stepped(tokens=1, decodes=1, seconds=1.0)

    assert (pace.prompt_tokens, pace.seconds) == (190, 1.0)
