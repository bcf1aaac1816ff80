"""Run jobs in child processes, so that neither an error nor a device that hangs ends the whole run."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import Job
from benchmarks.gpu.report import Options
from benchmarks.gpu.results import Results, Row, sentence

_GRACE = 15.0  # seconds that a job may take beyond its time limit before its process is killed
_RESERVE = 3.0  # seconds for the end of the run
_KILLED = 10.0  # seconds for the end of a killed process: the driver has much memory to free, or hangs


class Child:
    """A measuring process. `events` receives what it sends, and None when it has ended.

    modules   what it imports while it waits for its first job
    """

    def __init__(self, environment: Mapping[str, str], log: Path, modules: Sequence[str]) -> None:
        reading, writing = os.pipe()
        with log.open("ab") as out:
            # A session of its own, so that the processes that it starts are ended together with it.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.processes.child", str(writing), *modules],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=dict(environment),
                pass_fds=(writing,),
                start_new_session=True,
                text=True,
            )
        os.close(writing)
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._reader.start()

    def _read(self, reading: int) -> None:
        with os.fdopen(reading) as events:
            for line in events:
                self.events.put(json.loads(line))
        self.events.put(None)

    def ask(self, job: dict[str, Any]) -> None:
        """Let it begin a job."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def end(self) -> str:
        """End it and all processes that it started. Returns how it ended."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            code = self._process.wait(_KILLED)
        except subprocess.TimeoutExpired:
            return "it does not end although it was killed"
        self._reader.join(_KILLED)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


class Runner:
    """Runs jobs within a time limit, prints what they find, and writes the results after each.

    seconds       for all jobs together
    environment   of the processes, and log, the file of their output
    modules       are imported by each process before its first job
    echo          prints a line
    """

    def __init__(
        self,
        results: Results,
        options: Options,
        *,
        seconds: float,
        environment: Mapping[str, str],
        modules: Sequence[str] = (),
        echo: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._results = results
        self._options = options
        self._environment = environment
        self._modules = modules
        self._log = options.out / "processes.log"
        self._echo = echo
        self._clock = clock
        self._began = clock()
        self._ends = self._began + seconds
        self._child: Child | None = None
        self._group = ""
        self._next: Child | None = None  # started before it is needed, because imports take seconds

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs for which time is left."""
        self._options.out.mkdir(parents=True, exist_ok=True)
        try:
            for job, following in zip(jobs, [*jobs[1:], None], strict=True):
                left = self._ends - self._clock() - _RESERVE
                if left < job.least:
                    text = f"skipped: {max(left, 0):.0f} s are left, it needs at least {job.least:g}"
                    self._end(job, 0.0, skipped=text)
                else:
                    self._run(job, min(job.seconds, left), following)
        finally:
            self._stop()
            if self._next is not None:
                self._next.end()

    def _run(self, job: Job, seconds: float, following: Job | None) -> None:
        if job.group != self._group:
            self._stop()
        if self._child is None:
            self._child, self._next = self._next or self._new_child(), None
            self._group = job.group
        if following is not None and following.group != job.group and self._next is None:
            self._next = self._new_child()
        began = self._clock()
        self._say(f"{job.name}: at most {seconds:.0f} s")
        ask = {
            "module": job.module or f"benchmarks.gpu.parts.{job.part}",
            "part": job.part,
            "model": job.model,
            "options": self._options.as_json(),
            "facts": self._results.facts,
            "seconds": seconds,
        }
        error, usable = "its process had ended", False
        with suppress(BrokenPipeError):
            self._child.ask(ask)
            error, usable = self._follow(self._child, min(began + seconds + _GRACE, self._ends))
        if not usable:
            error = f"{error} ({self._stop()}; see {self._log})"
        self._end(job, self._clock() - began, error=error)

    def _new_child(self) -> Child:
        return Child(self._environment, self._log, self._modules)

    def _follow(self, child: Child, until: float) -> tuple[str, bool]:
        """Take the events of one job. Returns its error, if any, and whether the process is still usable."""
        while True:
            try:
                event = child.events.get(timeout=max(until - self._clock(), 0.0))
            except queue.Empty:
                return "its time limit was exceeded", False
            if event is None:
                return "its process ended", False
            if "done" in event:
                return event["done"], event["usable"]
            if "fact" in event:
                name, value = event["fact"]
                self._results.facts[name] = value
            if "say" in event:
                self._say(event["say"])
            if "row" in event:
                row = Row(**event["row"])
                self._results.rows.append(row)
                self._say(sentence(row))

    def _end(self, job: Job, seconds: float, *, error: str = "", skipped: str = "") -> None:
        self._results.ended[job.name] = {"seconds": seconds, "error": error, "skipped": skipped}
        self._results.write(self._options.out)
        if error or skipped:
            self._say(f"{job.name}: {f'FAILED, {error}' if error else skipped}")

    def _stop(self) -> str:
        if self._child is None:
            return ""
        child, self._child, self._group = self._child, None, ""
        return child.end()

    def _say(self, text: str) -> None:
        self._echo(f"{self._clock() - self._began:6.1f} s  {text}")
