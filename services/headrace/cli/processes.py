"""Run a crew of child processes: start them in stages, notice a death, stop them in reverse.

Knows nothing of what the children do. Nothing is ever restarted here: a death is reported, with its
exit code and the end of its log, and the caller ends the rest.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
    from pathlib import Path

_TAIL_BYTES = 16_384
_HEAD_BYTES = 1 << 20  # of a log, for what was written during the start


@dataclass(frozen=True, kw_only=True)
class Process:
    """A child to run: its standard output and error go to *log*."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]  # all of it
    port: int = 0


class ChildDied(Exception):
    """A child ended although nobody had asked it to. The message has its reason, or the end of its log."""

    def __init__(self, process: Process, code: int) -> None:
        self.process = process
        self.code = code
        reason = reason_of(process.log) if code > 0 else ""
        last = "\n".join(f"  {line}" for line in tail(process.log))
        super().__init__(
            f"{process.name} {how_it_ended(code)}: {reason} (log: {process.log})"
            if reason
            else f"{process.name} {how_it_ended(code)}; the end of {process.log}:\n{last or '  (empty)'}"
        )


class Crew:
    """Running children, by name; made by `crew`."""

    def __init__(self, grace: float, say: Callable[[str], None]) -> None:
        self._grace = grace
        self._say = say
        self._stages: list[list[tuple[Process, asyncio.subprocess.Process]]] = []

    @property
    def pids(self) -> dict[str, int]:
        """The process ids by name."""
        return {process.name: child.pid for stage in self._stages for process, child in stage}

    def dead(self) -> ChildDied | None:
        """Return the first death so far, if any, without waiting."""
        for stage in self._stages:
            for process, child in stage:
                if child.returncode is not None:
                    return ChildDied(process, child.returncode)
        return None

    async def watch(self) -> None:
        """Wait until a child ends, then raise ChildDied."""
        children = [pair for stage in self._stages for pair in stage]
        waits = [asyncio.create_task(child.wait()) for _, child in children]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        for process, child in children:
            if child.returncode is not None:
                raise ChildDied(process, child.returncode)

    async def start(self, stage: Sequence[Process]) -> None:
        """Start the processes of one stage."""
        self._stages.append([])
        for process in stage:
            with process.log.open("ab") as log:
                child = await asyncio.create_subprocess_exec(
                    *process.command,
                    env=process.environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # A session of its own: Ctrl-C in the terminal reaches us alone, and we stop the
                    # children in order.
                    start_new_session=True,
                )
            self._stages[-1].append((process, child))

    async def stop(self) -> None:
        """End the stages, last started first: SIGTERM, up to *grace* seconds each, then SIGKILL.

        Cancelling this kills what is left at once.
        """
        try:
            for stage in reversed(self._stages):
                alive = [(process, child) for process, child in stage if child.returncode is None]
                for _, child in alive:
                    with suppress(ProcessLookupError):
                        child.terminate()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._grace):
                        await asyncio.gather(*(child.wait() for _, child in alive))
                await self._kill(stage)
        finally:
            await self._kill([pair for stage in self._stages for pair in stage])

    async def _kill(self, children: Sequence[tuple[Process, asyncio.subprocess.Process]]) -> None:
        for process, child in children:
            if child.returncode is None:
                self._say(f"{process.name} did not stop when asked; killed it")
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        await asyncio.gather(*(child.wait() for _, child in children))


@asynccontextmanager
async def crew(
    stages: Sequence[Sequence[Process]], *, grace: float, say: Callable[[str], None] = lambda line: None
) -> AsyncGenerator[Crew, None]:
    """Run *stages* in order, and stop them in reverse order when the block is left.

    *grace* is how many seconds each stage has between SIGTERM and SIGKILL; *say* hears about kills.
    """
    running = Crew(grace, say)
    try:
        for stage in stages:
            await running.start(stage)
        yield running
    finally:
        await running.stop()


def how_it_ended(code: int) -> str:
    """Say an exit code in words."""
    if code < 0:
        with suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def tail(log: Path, lines: int = 12) -> list[str]:
    """Return the last *lines* of a log, made readable."""
    shown = [part for line in _last_lines(log) if line.strip() for part in readable(line).splitlines()]
    return shown[-lines:]


def readable(line: str) -> str:
    """Turn a JSON log line into what a person wants of it; leave other lines alone."""
    record = _record(line)
    if record is None:
        return line
    rest = {name: value for name, value in record.items() if name not in _USUAL}
    fields = " ".join(f"{name}={value}" for name, value in rest.items())
    head = " ".join(filter(None, [str(record.get("level", "")), str(record["message"]), fields]))
    trace = record.get("exc_info")
    return f"{head}\n{trace}" if trace else head


_USUAL = {
    "time",
    "level",
    "logger",
    "message",
    "service",
    "trace_id",
    "span_id",
    "exc_info",
    "taskName",
    "notice",
}


def reason_of(log: Path) -> str:
    """Return why the process ended, as it logged last: a critical message without a traceback; else empty."""
    for line in reversed(_last_lines(log)):
        record = _record(line)
        if record and record.get("level") == "CRITICAL" and "exc_info" not in record:
            return str(record["message"])
        if line.strip() and record is None:  # a traceback, say, which came after
            return ""
    return ""


def notices_of(log: Path) -> list[str]:
    """Return what the process logged during its start for whoever started it, such as weights not used."""
    with suppress(OSError), log.open("rb") as file:
        records = map(_record, file.read(_HEAD_BYTES).decode(errors="replace").splitlines())
        return [str(record["message"]) for record in records if record and record.get("notice") is True]
    return []


def stage_of(log: Path) -> str:
    """Return the stage that the process last logged as loading; empty if it logged none."""
    for line in reversed(_last_lines(log)):
        record = _record(line)
        if record and record["message"] == "loading":
            return str(record.get("stage", ""))
    return ""


def _last_lines(log: Path) -> list[str]:
    """The lines at the end of a log; none if it cannot be read."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()
    return []


def _record(line: str) -> dict[str, Any] | None:
    with suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict) and "message" in record:
            return record
    return None


def log_folder(cache: Path, now: float | None = None) -> Path:
    """Name a folder for the logs of a run that starts now."""
    return cache / "logs" / time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
