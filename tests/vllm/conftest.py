"""Workers with a real vLLM, as processes of its own environment, behind a batcher and a router.

HEADRACE_VLLM_PYTHON is the interpreter of that environment, which `make test-vllm` makes. Without it
these tests are not collected; with it, an environment without vLLM is an error.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from headrace import models
from headrace.cli.demo.otlp_receiver import Receiver, otlp_receiver
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import Client
from headrace.worker.engine.load.gguf.unpacking import unpack
from tests.faults.fleet import Child, Fleet, Plan, fleet
from tests.faults.secured import connect

PYTHON = os.environ.get("HEADRACE_VLLM_PYTHON", "")
START_SECONDS = (
    600.0  # vLLM takes half a minute, several times that at its first import and on a busy machine
)
TIER = "only"
MAX_RUNNING = 16
CONTEXT = 1024
# In float32 no two tokens of these answers are nearly equally likely: a greedy answer is the same in any
# batch.
DTYPE = "float32"
ENGINE_ARGS = "--enforce-eager --block-size 32"

if not PYTHON:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder, which wait for processes that take minutes to start."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
async def python() -> str:
    """Return the interpreter of an environment that has vLLM and our services."""
    look = "import importlib.util, headrace; assert importlib.util.find_spec('vllm') is not None, 'no vLLM'"
    process = await asyncio.create_subprocess_exec(
        *(PYTHON, "-c", look), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    printed, _ = await process.communicate()
    if process.returncode:
        pytest.fail(f"HEADRACE_VLLM_PYTHON={PYTHON} has no vLLM or no Headrace: {printed.decode()}")
    return PYTHON


@pytest.fixture(scope="session")
async def folder() -> Path:
    """Return the small default model as a folder, because vLLM reads no .gguf. It is made once per cache."""
    return await asyncio.to_thread(unpack, models.SMALL, models.cache_folder(), print)


def worker_flags(folder: Path, *flags: str, engine_args: str = ENGINE_ARGS) -> list[str]:
    """Return the flags of a worker with vLLM."""
    common = ["--engine", "vllm", "--model", str(folder), "--dtype", DTYPE, "--kv-memory", "1"]
    limits = ["--context-length", str(CONTEXT), "--max-running", str(MAX_RUNNING)]
    return [*common, *limits, "--engine-args", engine_args, *flags]


def vllm_plan(python: str, folder: Path, **options: Any) -> Plan:
    """Return a tier: one worker with vLLM, a batcher and a router, changed by *options*."""
    own = {"worker_flags": worker_flags(folder), "batcher_flags": ("--model", str(folder)), **options}
    return Plan(
        **{"workers": 1, "batchers": 1, "routers": 1, "tier": TIER, **own},
        worker_module="headrace.worker",
        worker_python=python,
        start_seconds=START_SECONDS,
    )


@dataclass(frozen=True)
class Served:
    """One worker with vLLM behind a batcher and a router, and what they export.

    metrics_port   of the worker's endpoint for Prometheus
    """

    fleet: Fleet
    client: Client
    spans: Receiver
    metrics_port: int

    @property
    def worker(self) -> Child:
        """The worker's process."""
        return self.fleet.workers[0]


@pytest.fixture(scope="session")
async def served(
    python: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[Served, None]:
    """Run one worker for all tests that leave it as it was."""
    logs = tmp_path_factory.mktemp("vllm")
    with reserved_ports(1) as (metrics_port,):
        async with otlp_receiver() as spans:
            plan = vllm_plan(
                python,
                folder,
                worker_flags=worker_flags(folder, "--metrics-port", str(metrics_port), "--tier", TIER),
                environment=spans.environment,
            )
            async with fleet(plan, logs) as running, connect(running.target, retries=0) as client:
                yield Served(running, client, spans, metrics_port)


@pytest.fixture
async def client(served: Served) -> Client:
    """Return a client of the router. The tier is idle when the test starts."""
    await served.fleet.quiet()
    return served.client
