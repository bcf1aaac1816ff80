"""Help is read on narrow terminals, too."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from headrace.cli.__main__ import app


@pytest.mark.parametrize(
    "command", [command.callback.__name__ for command in app.registered_commands if command.callback]
)
def test_nothing_is_cut_off_at_eighty_columns(command: str) -> None:
    printed = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).output

    assert "--help" in printed
    assert "…" not in printed
