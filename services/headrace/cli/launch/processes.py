"""Run child processes: start them in stages, detect the end of one, stop them in reverse order.

This module does not know what the children do. It restarts nothing: if a child ends, it is reported with
its exit code and the end of its log, and the caller stops the others.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
    from pathlib import Path

_TAIL_BYTES = 16_384
_HEAD_BYTES = 1 << 20  # of a log: what was written during the start


@dataclass(frozen=True, kw_only=True)
class Process:
    """A child process; its standard output and standard error are appended to *log*."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]  # complete
    port: int = 0
    protocol: Literal["grpc", "http"] = "grpc"  # in which it is asked for its health
    about: str = ""  # a few words about it, such as its model


class ChildDied(Exception):
    """A child ended without being stopped. The message contains its reason, or the end of its log."""

    def __init__(self, process: Process, code: int) -> None:
        self.process = process
        self.code = code
        reason = reason_of(process.log) if code > 0 else ""
        last = "\n".join(f"  {line}" for line in tail(process.log))
        super().__init__(
            f"{process.name} {exit_description(code)}: {reason} (log: {process.log})"
            if reason
            else f"{process.name} {exit_description(code)}; the end of {process.log}:\n{last or '  (empty)'}"
        )


class Crew:
    """Running child processes; created by `crew`."""

    def __init__(self, grace: float, notify: Callable[[str], None]) -> None:
        self._grace = grace
        self._notify = notify
        self._stages: list[list[tuple[Process, asyncio.subprocess.Process]]] = []

    @property
    def pids(self) -> dict[str, int]:
        """The process ids by name."""
        return {process.name: child.pid for stage in self._stages for process, child in stage}

    def ended(self) -> ChildDied | None:
        """Return the first child that has ended, if any, without waiting."""
        for stage in self._stages:
            for process, child in stage:
                if child.returncode is not None:
                    return ChildDied(process, child.returncode)
        return None

    async def watch(self) -> None:
        """Wait until a child ends, and raise ChildDied."""
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
                    # In a session of its own, so that Ctrl-C in the terminal reaches only this process,
                    # which stops the children in order.
                    start_new_session=True,
                )
            self._stages[-1].append((process, child))

    async def stop(self) -> None:
        """Stop the stages in reverse order: SIGTERM, up to *grace* seconds each, then SIGKILL.

        If this is cancelled, the remaining children are killed immediately.
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
                self._notify(f"{process.name} did not stop in time and was killed")
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        await asyncio.gather(*(child.wait() for _, child in children))


@asynccontextmanager
async def crew(
    stages: Sequence[Sequence[Process]], *, grace: float, notify: Callable[[str], None] = lambda line: None
) -> AsyncGenerator[Crew, None]:
    """Start *stages* in order, and stop them in reverse order at the end of the block.

    grace    seconds between SIGTERM and SIGKILL, per stage
    notify   receives a sentence about each child that is killed
    """
    running = Crew(grace, notify)
    try:
        for stage in stages:
            await running.start(stage)
        yield running
    finally:
        await running.stop()


def exit_description(code: int) -> str:
    """Describe an exit code."""
    if code < 0:
        with suppress(ValueError):
            return f"was terminated by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def tail(log: Path, lines: int = 12) -> list[str]:
    """Return the last *lines* of a log, formatted for people."""
    shown = [part for line in _last_lines(log) if line.strip() for part in readable(line).splitlines()]
    return shown[-lines:]


def readable(line: str) -> str:
    """Format a JSON log line for people; other lines are returned unchanged."""
    record = _record(line)
    if record is None:
        return line
    rest = {name: value for name, value in record.items() if name not in _HIDDEN}
    fields = " ".join(f"{name}={value}" for name, value in rest.items())
    head = " ".join(filter(None, [str(record.get("level", "")), str(record["message"]), fields]))
    trace = record.get("exc_info")
    return f"{head}\n{trace}" if trace else head


_HIDDEN = {
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
    """Return the reason that the process logged last: a critical message without a traceback; else empty."""
    for line in reversed(_last_lines(log)):
        record = _record(line)
        if record and record.get("level") == "CRITICAL" and "exc_info" not in record:
            return str(record["message"])
        if line.strip() and record is None:  # for example a traceback, logged later
            return ""
    return ""


def notices_of(log: Path) -> list[str]:
    """Return the messages of the start that are meant for the user, such as weights that are not used."""
    with suppress(OSError), log.open("rb") as file:
        records = map(_record, file.read(_HEAD_BYTES).decode(errors="replace").splitlines())
        return [str(record["message"]) for record in records if record and record.get("notice") is True]
    return []


def stage_of(log: Path) -> str:
    """Return the last stage of loading in the log; empty if there is none."""
    for line in reversed(_last_lines(log)):
        record = _record(line)
        if record and record["message"] == "loading":
            return str(record.get("stage", ""))
    return ""


def _last_lines(log: Path) -> list[str]:
    """Return the lines at the end of a log; none if it cannot be read."""
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
    """Return the folder for the logs of a run that starts now."""
    return cache / "logs" / time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
