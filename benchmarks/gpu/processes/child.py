"""A process that measures: `python -m benchmarks.gpu.processes.child FD MODULE...`.

It imports the modules, reads one job per line from standard input, runs it, and writes events as lines of
JSON to the file descriptor FD. Its standard output and error are a log. After an error that leaves CUDA
unusable it ends, and the runner continues in a new process. It also ends when the runner has ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from importlib import import_module
from typing import Any, TextIO

from benchmarks.gpu.report import Options, Report
from benchmarks.gpu.shapes import SHAPES
from headrace.runtime.telemetry import logs

_FATAL = ("CUDA error", "[CUDA]", "device-side assert", "illegal memory access")


def main() -> None:
    """Run the jobs."""
    descriptor, *modules = sys.argv[1:]
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    logs.configure("benchmark", "WARNING")  # with the reasons that the engine's thread logs before it exits
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


def _end_with(parent: int) -> None:
    """End this process and those it has started when the runner is killed: they hold the device's memory."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpid(), signal.SIGKILL)


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
        usable = not any(words in text for words in _FATAL) and _device_works()
        send({"done": text.splitlines()[0][:500], "usable": usable})
        return usable
    send({"done": "", "usable": True})
    return True


def _device_works() -> bool:
    """Return whether CUDA and torch's allocator work, or have not been used."""
    import torch

    cuda: Any = torch.cuda
    if not cuda.is_initialized():
        return True
    try:
        cuda.synchronize()
        cuda.empty_cache()  # raises after a capture that failed, see `cuda.GraphPool.waits`
    except Exception:
        traceback.print_exc()
        return False
    return True


if __name__ == "__main__":
    main()
