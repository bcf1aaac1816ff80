"""What `headrace up` decides and prints, and signals to a command that runs until it is stopped."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from headrace.cli.launch import mesh, up
from headrace.cli.launch.tiers import BadSpec


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


def test_the_gateway_has_its_usual_port_or_a_free_one_with_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=StringIO(), width=200)
    with socket.create_server((mesh.HOST, 0)) as server:
        taken, (free,) = server.getsockname()[1], mesh.free_ports(1)

        monkeypatch.setattr(up, "DEFAULT_GATEWAY_PORT", free)
        assert up.gateway_port(0, console) == free
        assert console.file.getvalue() == ""  # type: ignore[attr-defined] # of StringIO
        assert up.gateway_port(free, console) == 0, "the router gets it"

        monkeypatch.setattr(up, "DEFAULT_GATEWAY_PORT", taken)
        assert up.gateway_port(0, console) == 0
        notice = console.file.getvalue()  # type: ignore[attr-defined]
        assert f"port {taken} is in use" in notice
        assert "--gateway-port" in notice
        assert "--no-gateway" in notice

        with pytest.raises(BadSpec, match=r"--port .*Is a mesh running already\?"):
            up.gateway_port(taken, console)


def test_the_example_for_curl_survives_a_shell() -> None:
    command, _ = up.http_examples("http://127.0.0.1:8080")

    program, url, *_, body = shlex.split(command)
    assert (program, url) == ("curl", "http://127.0.0.1:8080/v1/chat/completions")
    assert json.loads(body)["messages"] == [{"role": "user", "content": "Hello!"}]
    assert up.http_examples("") == [], "without a gateway"


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
