"""Help has examples, and fits on narrow terminals."""

from __future__ import annotations

import re

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from headrace.cli.__main__ import app

COMMANDS = list(get_command(app).commands)  # type: ignore[attr-defined] # of a group


def test_the_commands_are_listed() -> None:
    printed = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "160", "NO_COLOR": "1"}).output

    assert sorted(re.findall(r"^│ (\w+)  ", printed, re.MULTILINE)) == sorted(COMMANDS)
    assert {"fetch", "up", "demo", "chat", "explain", "tiers"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    printed = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "160", "NO_COLOR": "1"}).output

    assert f"headrace {command} " in printed.partition("Example:")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_cut_off_at_eighty_columns(command: str) -> None:
    printed = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).output

    assert "--help" in printed
    assert "…" not in printed
