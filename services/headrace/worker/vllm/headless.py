"""Compute on one node for a worker on another: `python -m headrace.worker.vllm.headless --help`.

A model over several nodes has one worker, on the first node, which batchers call. On each other node this
runs, with the worker's settings but for `--node-rank` in --engine-args: it loads the node's part of the
model, and computes what the worker's engine asks for. It serves nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from headrace.models import ModelUnavailable, cache_folder, readable_as_folder, resolve
from headrace.runtime.telemetry import logs
from headrace.worker.engine.load.refusals import LoadingError, one_line
from headrace.worker.settings import Settings
from headrace.worker.vllm.arguments import arguments, environment
from headrace.worker.vllm.loading import compute_rows_alike, parse

log = logging.getLogger("headrace.worker")

_POLL_SECONDS = 1.0
_CONNECT_SECONDS = 5.0


def compute(settings: Settings) -> None:
    """Compute until a process of the group ends. Raises LoadingError and ModelUnavailable."""
    if settings.engine != "vllm":
        raise LoadingError("set HEADRACE_ENGINE (or --engine) to vllm: only vLLM computes over several nodes")
    cache = Path(settings.cache) if settings.cache else cache_folder()
    folder = readable_as_folder(resolve(settings.model, cache), cache)
    os.environ.update(environment(os.environ, debug=log.isEnabledFor(logging.DEBUG)))
    if settings.exact:
        compute_rows_alike()
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    given = parse(arguments(settings, folder), cache=cache)
    _require_rank(given)
    leader = str(given.master_addr), int(given.master_port)
    log.info("loading", extra={"stage": f"rank {given.node_rank} of {leader[0]}", "model": settings.model})
    # The pods of a group are stopped together. The worker still drains then, and needs this process for it.
    signal.signal(signal.SIGTERM, lambda number, frame: _end_with(leader))
    try:
        config = given.create_engine_config(usage_context=UsageContext.ENGINE_CONTEXT, headless=True)
        executor: Any = MultiprocExecutor(config, monitor_workers=False)
    except Exception as error:
        log.debug("vLLM does not start", exc_info=True)
        raise LoadingError(f"vLLM cannot load {settings.model}: {one_line(error)}") from error
    log.info("ready", extra={"model": settings.model, "rank": given.node_rank})
    executor.start_worker_monitor(inline=True)
    raise LoadingError("a process of this node has ended; its own messages are above")


def _require_rank(given: Any) -> None:
    """Raise LoadingError unless vLLM's arguments are those of a node other than the first."""
    if given.nnodes < 2 or given.node_rank < 1:
        raise LoadingError(
            f"--engine-args has --nnodes {given.nnodes} --node-rank {given.node_rank}: this command is for "
            "nodes with a rank of 1 or more; `python -m headrace.worker` runs on the one with rank 0"
        )


def _end_with(leader: tuple[str, int]) -> None:
    """End this process when nobody listens at *leader* any more."""

    def watch() -> None:
        while True:
            try:
                socket.create_connection(leader, timeout=_CONNECT_SECONDS).close()
            except OSError:
                os._exit(0)
            time.sleep(_POLL_SECONDS)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    settings = Settings.load(program="python -m headrace.worker.vllm.headless")
    logs.configure("worker", settings.log_level)
    try:
        compute(settings)
    except (LoadingError, ModelUnavailable) as error:
        log.critical("%s", error)
        raise SystemExit(1) from None
