"""Start the processes of systems, and exchange messages with `hosts/pipe.py` in those without a server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.serving.peers import REPOSITORY
from benchmarks.serving.systems import SystemFailed
from benchmarks.serving.workload import Request
from headrace.cli.launch.processes import exit_description, tail

START_SECONDS = 900.0
_STOP_SECONDS = 20.0
_LINE_BYTES = 1 << 22


@asynccontextmanager
async def process(
    name: str,
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    *,
    piped: bool = False,
) -> AsyncGenerator[asyncio.subprocess.Process, None]:
    """Run a command in a process group of its own, which is stopped when the block is left.

    piped   whether its standard input and output are pipes; otherwise output goes to the log
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        child = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, **(environment or {})},
            cwd=REPOSITORY,
            stdin=asyncio.subprocess.PIPE if piped else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if piped else out,
            stderr=out,
            start_new_session=True,
            limit=_LINE_BYTES,
        )
    try:
        yield child
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_SECONDS):
                    await child.wait()


def died(name: str, child: asyncio.subprocess.Process, log: Path) -> SystemFailed:
    """Return an error with how a process ended and the end of its log."""
    last = "\n".join(f"  {line}" for line in tail(log))
    how = exit_description(child.returncode) if child.returncode is not None else "closed its output"
    return SystemFailed(f"{name} {how}; the end of {log}:\n{last or '  (empty)'}")


class Piped:
    """An engine in a child process."""

    def __init__(self, name: str, child: asyncio.subprocess.Process, log: Path) -> None:
        self._name, self._child, self._log = name, child, log
        self.versions: dict[str, str] = {}
        self.pids = [child.pid]
        self._answers: dict[int, asyncio.Queue[list[int] | None]] = {}
        self._next = 0

    async def generate(self, request: Request) -> AsyncGenerator[list[int], None]:
        """Stream the answer; see `systems.Running`."""
        assert self._child.stdin is not None
        key, self._next = self._next, self._next + 1
        queue = self._answers[key] = asyncio.Queue()
        ask = {"key": key, "prompt": request.prompt_ids, "tokens": request.output_tokens}
        try:
            self._child.stdin.write(json.dumps(ask).encode() + b"\n")
            left = request.output_tokens
            while left > 0:
                ids = await queue.get()
                if ids is None:
                    raise died(self._name, self._child, self._log)
                left -= len(ids)
                yield ids
        finally:
            del self._answers[key]

    async def until_ready(self) -> None:
        """Wait until the engine is loaded. Raises SystemFailed if the process ends."""
        assert self._child.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = await self._child.stdout.readline()
            if not line:
                await self._child.wait()
                raise died(self._name, self._child, self._log)
        self.versions = json.loads(line)["ready"]

    async def listen(self) -> None:
        """Distribute the child's tokens to the answers, until it ends."""
        assert self._child.stdout is not None
        async for line in self._child.stdout:
            for key, ids in json.loads(line)["tokens"]:
                if key in self._answers:
                    self._answers[key].put_nowait(ids)
        await self._child.wait()
        for queue in self._answers.values():
            queue.put_nowait(None)


@asynccontextmanager
async def piped(
    name: str,
    python: Path | str,
    host: str,
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> AsyncGenerator[Piped, None]:
    """Run `benchmarks.serving.hosts.HOST` with an interpreter; it is loaded when the block is entered."""
    command = [str(python), "-m", f"benchmarks.serving.hosts.{host}", *arguments]
    async with process(name, command, log, environment, piped=True) as child:
        system = Piped(name, child, log)
        await system.until_ready()
        listening = asyncio.create_task(system.listen())
        try:
            yield system
        finally:
            listening.cancel()
