"""Ctrl-C in a conversation, at any time."""

from __future__ import annotations

import pytest

from headrace.cli.calls import conversation
from headrace.cli.calls.chat import ChatOptions
from headrace.cli.calls.connection import Connection


@pytest.mark.parametrize("interrupted", range(4))
def test_control_c_during_output_does_not_end_the_conversation(
    monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    """As when it is pressed twice: the second arrives while the first is handled."""
    typed = iter(["/sing", "", "/good", "", "/bad"])
    said: list[str] = []
    pressed = False

    def read(mark: str) -> str:
        if (line := next(typed, None)) is None:
            raise EOFError
        if not line:
            raise KeyboardInterrupt
        return line

    def note(line: str) -> None:
        nonlocal pressed
        if (
            len(said) == interrupted + 1 and not pressed
        ):  # the first line is printed before the conversation starts
            pressed = True
            raise KeyboardInterrupt
        said.append(line.strip())

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(conversation, "_note", note)

    conversation.conversation(ChatOptions(connection=Connection(target="127.0.0.1:1")))

    assert pressed
    assert said[-1] == "", "it ended by Ctrl-D"
    assert said.count("(Ctrl-D exits)") >= 2
    assert list(typed) == []
