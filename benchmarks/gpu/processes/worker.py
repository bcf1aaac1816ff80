"""A worker with random weights: `python -m benchmarks.gpu.processes.worker --model FOLDER ...`.

It has the flags of a worker. The name of FOLDER is that of a shape, and `shapes.model_folder` has written it.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from benchmarks.gpu.shapes import SHAPES
from headrace.models import tokenizer_fingerprint
from headrace.runtime.serving.server import run, until_signal
from headrace.runtime.telemetry import logs
from headrace.worker.__main__ import engine_loop, worker
from headrace.worker.runner import Runner
from headrace.worker.sequences import SequenceKey
from headrace.worker.settings import Settings

log = logging.getLogger("headrace.worker")


async def main(settings: Settings) -> None:
    """Serve until a signal arrives."""

    def load() -> Runner[SequenceKey]:
        from benchmarks.gpu import engines  # takes seconds, during which the server already answers

        folder = Path(settings.model)
        engine = engines.load(
            SHAPES[folder.name],
            folder,
            device=settings.device,
            dtype=settings.dtype,
            kv_memory=settings.kv_memory or None,
            tokenizer_fingerprint=tokenizer_fingerprint(folder),
            progress=lambda stage: log.info("loading", extra={"stage": stage}),
            sizes=engines.Sizes(settings.max_running, settings.tokens_per_step, settings.context_length),
        )
        return engine_loop(engine, settings)

    async with worker(settings, load, f"{socket.gethostname()}-{os.getpid()}"):
        await until_signal()


if __name__ == "__main__":
    settings = Settings.load(program="python -m benchmarks.gpu.processes.worker")
    logs.configure("worker", settings.log_level)
    run(main(settings))
