"""A process that measures: `python -m benchmarks.gpu.processes.child FD MODULE...`.

It imports the modules, reads one job per line from standard input, runs it, and writes events as lines of
JSON to the file descriptor FD. Its standard output and error are a log. After an error that leaves CUDA
unusable it ends, and the runner continues in a new process.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from importlib import import_module
from typing import Any, TextIO

from benchmarks.gpu.report import Options, Report
from benchmarks.gpu.shapes import SHAPES

_FATAL = ("CUDA error", "device-side assert", "illegal memory access")


def main() -> None:
    """Run the jobs."""
    descriptor, *modules = sys.argv[1:]
    for module in modules:  # before it has a job to do
        import_module(module)
    with os.fdopen(int(descriptor), "w") as events:
        for line in sys.stdin:
            if not _run(json.loads(line), events):
                # Not through the interpreter's end, which may wait for threads and for a broken device.
                events.flush()
                os._exit(1)
        events.flush()
        os._exit(0)


def _run(ask: dict[str, Any], events: TextIO) -> bool:
    """Run one job. Returns whether the process can run another one."""

    def send(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    report = Report(
        ask["part"],
        ask["model"],
        Options.from_json(ask["options"]),
        send,
        ask["facts"],
        time.monotonic() + ask["seconds"],
    )
    try:
        module = import_module(ask["module"])
        module.run(report, SHAPES.get(ask["model"]))
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}".strip()
        usable = not any(words in text for words in _FATAL)
        send({"done": text.splitlines()[0][:500], "usable": usable})
        return usable
    send({"done": "", "usable": True})
    return True


if __name__ == "__main__":
    main()
