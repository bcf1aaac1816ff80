"""An answer is built from its events, and its speed from the clock."""

from __future__ import annotations

import pytest

from headrace.cli.answers import Answer, printable, seconds
from headrace.v1 import generation_pb2 as pb


def accepted(**fields: object) -> pb.GenerateResponse:
    return pb.GenerateResponse(accepted=pb.Accepted(**fields))  # type: ignore[arg-type]


def delta(text: str, offset: int, count: int = 1) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(text=text, offset=offset, token_count=count))


def finish(reason: pb.FinishReason.ValueType, tokens: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(finish=pb.Finish(reason=reason, usage=pb.Usage(completion_tokens=tokens)))


def test_events_add_up_to_an_answer() -> None:
    answer = Answer()

    texts = [
        answer.add(accepted(tier="small", model="echo", score=0.25, prompt_tokens=9), 0.1),
        answer.add(delta("Hel", 0), 0.5),
        answer.add(delta("lo", 1, 2), 1.5),
        answer.add(finish(pb.FINISH_REASON_STOP, 3), 1.6),
    ]

    assert texts == ["", "Hel", "lo", ""]
    assert answer.text == "Hello"
    assert answer.first_token == 0.5
    assert answer.tokens_per_second == pytest.approx(2.0)
    assert answer.figures() == (
        "tier small · echo · score 0.25 · first token 500 ms · 3 tokens · 2.0 tokens/s · stop"
    )


def test_a_missing_score_is_not_zero() -> None:
    answer = Answer()
    answer.add(accepted(tier="small"), 0.1)

    assert answer.score is None
    assert answer.figures() == "tier small · 0 tokens · not finished"


def test_one_token_has_no_rate() -> None:
    answer = Answer()
    answer.add(delta("x", 0), 0.5)
    answer.add(finish(pb.FINISH_REASON_LENGTH, 1), 0.5)

    assert answer.tokens_per_second is None
    assert answer.figures().endswith("1 token · length")


def test_a_move_to_another_server_is_reported() -> None:
    answer = Answer()
    move = pb.RouteChange(to="worker-2", reason="WORKER_LOST", attempt=1, **{"from": "worker-1"})
    answer.add(pb.GenerateResponse(route_change=move), 0.1)

    assert "moved from worker-1 to worker-2 (WORKER_LOST)" in answer.figures()


def test_terminals_get_no_escape_sequences() -> None:
    assert printable("a\x1b[31mb\x07\r\n\tc\x9bd\x7f") == "a[31mb\n\tcd"
    assert printable("Zoë – 日本") == "Zoë – 日本"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 µs"), (0.00035, "350 µs"), (0.0123, "12.3 ms"), (0.35, "350 ms"), (1.254, "1.25 s")],
)
def test_durations_are_formatted_for_people(value: float, text: str) -> None:
    assert seconds(value) == text


def test_calls_are_shown_one_per_line() -> None:
    answer = Answer()
    for part in (
        pb.ToolCallDelta(index=0, id="a", name="weather", arguments='{"city":\n'),
        pb.ToolCallDelta(index=0, arguments='"Ro\\nme"}'),
        pb.ToolCallDelta(index=1, id="b", name="clock"),
    ):
        answer.add(pb.GenerateResponse(delta=pb.Delta(tool_calls=[part], token_count=1)), 0.5)

    assert answer.lines_of_calls == ['weather({"city": "Ro\\nme"})', "clock()"]
    assert "2 calls" in answer.figures()
