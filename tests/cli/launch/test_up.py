"""Signals to a command that runs until it is stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli.launch import up


def test_an_interrupt_while_the_command_loads_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")

    out = subprocess.run(
        [sys.executable, "-c", "from headrace.cli import main; main()"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )

    assert (out.returncode, out.stdout, out.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("window", "ended"),
    [
        pytest.param(3600.0, "in order", id="two at once are one request"),
        pytest.param(0.0, "at once", id="a second one later does not wait"),
    ],
)
def test_a_second_signal(monkeypatch: pytest.MonkeyPatch, window: float, ended: str) -> None:
    monkeypatch.setattr(up, "_SAME_SIGNAL_SECONDS", window)
    told: list[str] = []
    how: list[str] = []

    async def until_stopped() -> None:
        signal.raise_signal(signal.SIGINT)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            signal.raise_signal(signal.SIGTERM)
            try:
                for _ in range(20):  # turns of the loop; a signal is handled in the first or the second
                    await asyncio.sleep(0)
                how.append("in order")
            except asyncio.CancelledError:
                how.append("at once")
            raise

    assert up.run_until_signal(until_stopped(), lambda: told.append("stopping"))
    assert (told, how) == (["stopping"], [ended])
