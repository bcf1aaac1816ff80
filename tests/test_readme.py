"""What README tells people to type works as printed."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace import attributes
from headrace.batcher.settings import Settings as BatcherSettings
from headrace.cli.__main__ import app
from headrace.cli.mesh import MeshSpec, Running, mesh
from headrace.router.settings import Settings as RouterSettings
from headrace.runtime.settings import ServiceSettings
from headrace.worker.settings import Settings as WorkerSettings
from tests.harness import PATIENCE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ADDRESS = "127.0.0.1:50051"
BATCHER = "127.0.0.1:50052"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language; "" for those without one."""
    every = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in every if name == language]


def grpcurl_commands() -> list[str]:
    """Every grpcurl command, with the lines that belong to it."""
    lines = "".join(block for block in blocks("") if "grpcurl -plaintext" in block)
    return re.findall(r"^grpcurl .*?(?=^grpcurl |\Z)", lines, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Running, None]:
    """`headrace up --fake`, on a free port."""
    folder = tmp_path_factory.mktemp("readme")
    async with mesh(MeshSpec(cache=folder, log_dir=folder / "logs", fake=True, fake_step_seconds=0)) as up:
        yield up


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    printed, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 0, printed.decode()
    return printed.decode()


async def test_every_grpcurl_command_works_as_printed(running: Running) -> None:
    commands = grpcurl_commands()
    assert len(commands) == 8
    batcher = next(process for process in running.processes if process.name == "batcher-small")

    def here(command: str) -> str:
        return command.replace(ADDRESS, running.address).replace(BATCHER, f"127.0.0.1:{batcher.port}")

    printed = [await run("bash", "-c", here(command)) for command in commands]

    listed, described, generated, explained, tiers, told, health, inside = printed
    assert '"state": "ready"' in inside
    assert "headrace.v1.GenerationService" in listed
    assert "rpc Generate" in described
    assert "What is the capital of France?" in generated, "the echo engine says it back"
    assert '"tier": "large"' in explained
    assert '"name": "small"' in tiers
    assert '"tier": "small"' in told
    assert "SERVING" in health


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]+", text))


@pytest.mark.parametrize("settings", [RouterSettings, BatcherSettings, WorkerSettings])
def test_every_flag_in_the_table_of_settings_is_one(
    settings: type[ServiceSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        settings.load(["--help"])
    service = settings.__module__.split(".")[1]
    rows = re.findall(rf"^\| (?:{service}|all) \| (.*--.*)$", README, re.MULTILINE)

    assert len(rows) == 2
    assert flags_in(" ".join(rows)) <= flags_in(capsys.readouterr().out)


def test_every_metric_to_watch_is_one() -> None:
    table = README.partition("| to watch | metrics |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([a-z_.]+)`", table))

    assert len(named) > 15
    assert named <= {value for name, value in vars(attributes).items() if name.startswith("METRIC_")}


def test_every_link_leads_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S), re.MULTILINE)
    anchors = {f"#{re.sub(r'[^a-z0-9 -]', '', heading.lower()).replace(' ', '-')}" for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", README)

    assert len(links) > 20
    for link in links:
        assert link in anchors if link.startswith("#") else (ROOT / link).exists(), link


def test_every_command_of_ours_that_is_shown_parses() -> None:
    """Up to its `--help`: commands and flags exist, whatever they would do."""
    shown = [
        shlex.split(line, comments=True)
        for block in blocks("")
        for line in block.splitlines()
        if re.match(r"(\w+=\S+ )*headrace ", line)
    ]
    assert len(shown) > 12
    for words in shown:
        command, *arguments = words[words.index("headrace") + 1 :]
        known = flags_in(CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output)
        assert known, command
        assert flags_in(" ".join(word for word in arguments if word.startswith("--"))) <= known, words


async def test_the_python_example_works_as_printed(running: Running, tmp_path: Path) -> None:
    (example,) = blocks("python")
    script = tmp_path / "example.py"
    script.write_text(example.replace(ADDRESS, running.address))

    assert "Why is the sky blue?" in await run(sys.executable, str(script))
