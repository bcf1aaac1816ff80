"""Run a whole mesh on this machine: per tier a worker and batchers or an upstream, the router, and a gateway.

`plan_processes` decides on commands and ports; `mesh` runs the processes and yields when all are ready.
`headrace up`, the demo and tests with real processes use it.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import socket
import sys
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headrace.cli.launch import child, vllm
from headrace.cli.launch.certificates import CA, CLIENT, cert_file, issue, key_file
from headrace.cli.launch.cores import cores, parallel_processes, worker_threads
from headrace.cli.launch.processes import ChildDied, Crew, Process, crew, notices_of
from headrace.cli.launch.readiness import StartState, until_ready
from headrace.cli.launch.tiers import API_KEY_FILE, DEFAULT_TIERS, BadSpec, TierSpec
from headrace.runtime.serving.bind_check import bind_error, explain
from headrace.tls.files import TlsFiles, TlsReader

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
    from pathlib import Path

HOST = "127.0.0.1"
GATEWAY_PORT = "--gateway-port"
_GPU_MEMORY_SHARE = "HEADRACE_GPU_MEMORY_SHARE"
_EDGES = ("router", "gateway")  # services that callers from outside of the mesh call
_STOP_SECONDS = 12.0  # after the drain, to return unfinished work, flush telemetry and exit
# `plan_processes` sets these for each process; inherited values would reach the wrong ones.
_PLANNED = {
    f"HEADRACE_{name}"
    for name in (
        *("HOST", "PORT", "METRICS_PORT", "MTLS_PORT", "HEALTH_PORT", "PROCESSES"),
        *("TIER", "TIERS", "WORKERS", "ROUTER", "MODEL", "FAKE", "THREADS", "ENGINE", "ENGINE_ARGS", "URL"),
        # HEADRACE_TLS_CA, _CERT and _KEY are also the caller's.
        *("TLS_CA", "TLS_CERT", "TLS_KEY", "TLS_CLIENT_CERTIFICATES", "TLS_PEERS"),
        *("HTTPS_CERT", "HTTPS_KEY"),  # a gateway is polled over HTTP
    )
}


@dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """The mesh to run."""

    cache: Path
    log_dir: Path
    tiers: Sequence[TierSpec] = DEFAULT_TIERS  # smallest first
    fake: bool = False  # echo engines instead of models
    fake_step_seconds: float = 0.02  # of a step of an echo engine; 0 for no delay
    echo_flags: Sequence[str] = ("--engine", "echo")  # of a worker with an echo engine
    port: int = 0  # of the router; 0 for a free one
    gateway_port: int | None = None  # of the gateway; 0 for a free one, None for no gateway
    metrics_port: int = 0  # of the first endpoint for Prometheus; the next ports are the others'. 0 for none
    device: str = ""  # of our engine; empty: the worker's default
    dtype: str = ""  # of our engine; empty: the worker's default
    gpu_memory_shares: Mapping[str, str] = field(default_factory=dict)  # by tier, where several use one GPU
    threads: int = 0  # per worker; 0 divides the cores between the workers
    vllm_python: str = ""  # path of the interpreter that runs workers on vLLM; empty for this one
    vllm_args: str = ""  # vLLM's arguments, for all its workers, as on the command line of `vllm serve`
    processes: int = 0  # of router and gateway, and batchers per tier; 0 for as many as the cores allow
    drain_seconds: float = 10.0
    tls: bool = False  # whether all connections use TLS, with certificates of a throw-away authority
    environment: Mapping[str, str] = field(default_factory=dict)  # for every process
    # Additional flags, by "worker", "batcher", "upstream", "router" and "gateway".
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """A mesh that is ready."""

    address: str  # of the router
    gateway: str  # URL of the gateway, such as http://127.0.0.1:8080; empty without one
    certificates: Path | None  # the folder of the certificates, if it uses TLS
    processes: Sequence[Process]
    pids: Mapping[str, int]


def require_free(port: int, setting: str = "--port") -> None:
    """Raise BadSpec if this process cannot listen on *port*. Port 0, for any free one, is always possible.

    setting   the flag that sets the port, for the message
    """
    problem = bind_error(HOST, port)
    if problem is None:
        return
    taken = isinstance(problem, OSError) and problem.errno == errno.EADDRINUSE
    hint = "; --no-gateway starts no gateway" if setting == GATEWAY_PORT else ""
    hint += ". Is a mesh running already?" if taken else ""
    raise BadSpec(explain(problem, HOST, port, setting) + hint) from problem


def require_free_ports(spec: MeshSpec) -> None:
    """Raise BadSpec if router or gateway cannot listen on the ports of *spec*."""
    require_free(spec.port)
    if spec.gateway_port:
        if spec.gateway_port == spec.port:
            raise BadSpec(f"--port and {GATEWAY_PORT} are both {spec.port}; router and gateway need one each")
        require_free(spec.gateway_port, GATEWAY_PORT)


def free_ports(count: int) -> list[int]:
    """Return *count* free ports; see `reserved_ports`."""
    with reserved_ports(count) as ports:
        return ports


@contextmanager
def reserved_ports(count: int) -> Generator[list[int], None, None]:
    """Find *count* free ports; no other caller finds the same ones while the block runs.

    Without the reservation, two meshes that start at the same time can choose the same port, seconds before
    either listens on it. A UDP socket reserves a port: it does not prevent listening for TCP.

    Ephemeral ports are not used: a connection may take one before the child listens, and a connection to an
    ephemeral port without a listener can even connect to itself.
    """
    candidates = iter(random.sample(range(20_000, 32_000), k=1_000))
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            port = next(candidates)
            with suppress(BadSpec, OSError):
                held.enter_context(socket.socket(type=socket.SOCK_DGRAM)).bind((HOST, port))
                require_free(port)
                found.append(port)
        yield found


def environment(spec: MeshSpec, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the children: *inherited* without planned settings, and that of *spec*."""
    kept = {name: value for name, value in inherited.items() if name not in _PLANNED}
    # The threads of a worker synchronise some hundred times per step. Without spinning they resume slowly:
    # a step of SmolLM2 on two cores takes 49 ms, with the default spinning of GNU OpenMP 27 ms. But spinning
    # threads occupy the cores: beside a second such worker, a step takes 813 ms. With a short spin of about
    # 10 us it takes 30 ms alone; where workers share the cores, one thread each is best.
    return {"GOMP_SPINCOUNT": "10000", **kept, **spec.environment}


def processes_of(spec: MeshSpec, cores: int) -> int:
    """Decide how many processes router and gateway have each, and how many batchers each tier has."""
    if spec.processes or sys.platform != "linux":  # elsewhere, processes cannot share the router's port
        return spec.processes or 1
    on_cpu = not spec.fake and spec.device in ("", "cpu")
    threads = _threads(spec, cores) if on_cpu else 1
    edges = 1 if spec.gateway_port is None else 2
    computing, upstreams = _counts(spec)
    return parallel_processes(cores - upstreams, computing, threads=threads, edges=edges)


def ports_needed(spec: MeshSpec, cores: int) -> int:
    """Return how many ports `plan_processes` needs: one per worker, batcher, upstream, router and gateway."""
    edges = 1 if spec.gateway_port is None else 2
    computing, upstreams = _counts(spec)
    return computing * (1 + processes_of(spec, cores)) + upstreams + edges


def _counts(spec: MeshSpec) -> tuple[int, int]:
    """Return how many tiers have workers, and how many are upstreams."""
    computing = sum(tier.computes for tier in spec.tiers)
    return computing, len(spec.tiers) - computing


def plan_processes(spec: MeshSpec, ports: Sequence[int], *, cores: int) -> list[list[Process]]:
    """Decide on the processes, as stages: workers, batchers and upstreams, the router, a gateway if wanted.

    Router and gateway are one process each here, which starts the others itself and listens with them on one
    port. Batchers have a port each, because the router chooses between them by their load.

    ports   `ports_needed` free ports; the last ones are those of router and gateway, if their ports are 0
    """
    inherited = environment(spec, os.environ)
    parallel = processes_of(spec, cores)
    threads = _threads(spec, cores)
    metrics_ports = itertools.count(spec.metrics_port + parallel)  # after those of the router's processes
    free = iter(ports)
    # Benchmarks also start older versions, which do not have the flag.
    several = ("--processes", str(parallel)) if parallel > 1 else ()

    def process(kind: str, name: str, port: int, *flags: str, tier: TierSpec | None = None) -> Process:
        common = ["--host", HOST, "--port", str(port), "--drain-seconds", str(spec.drain_seconds)]
        common += _tls_flags(spec, kind)
        own = {}
        if tier is not None:
            # HEADRACE_TRACE_CONTEXT is for external callers, which call router and gateway. Variables rather
            # than flags, because benchmarks also start older versions, which do not have the flags.
            own = {"HEADRACE_TRACE_CONTEXT": "trust", "HEADRACE_TIER": tier.name}
            share = spec.gpu_memory_shares.get(tier.name)
            if share and kind == "worker" and _GPU_MEMORY_SHARE not in inherited:
                own[_GPU_MEMORY_SHARE] = share
        if spec.metrics_port:
            own["HEADRACE_METRICS_PORT"] = str(spec.metrics_port if kind == "router" else next(metrics_ports))
        variables = {name: value for name, value in inherited.items() if _is_for(kind, name)} | own
        python = sys.executable
        if kind == "worker" and _on_vllm(spec, tier):
            python = spec.vllm_python or python
            variables = vllm.environment(
                variables,
                python=spec.vllm_python,
                packages=packages_of(spec),
                threads=threads,
                arguments=spec.vllm_args,
            )
        return Process(
            name=name,
            command=[
                python,
                # By path: PYTHONPATH may name the services of another version, which has no such module.
                *("-P", child.__file__, str(os.getpid()), f"headrace.{kind}"),
                *common,
                *flags,
                *spec.flags.get(kind, ()),
            ],
            log=spec.log_dir / f"{name}.log",
            environment=variables,
            port=port,
            protocol="http" if kind == "gateway" else "grpc",
            about=tier.described(fake=spec.fake) if tier else "",
        )

    workers = [
        (
            tier,
            process(
                "worker", f"worker-{tier.name}", next(free), *_worker_flags(spec, tier, threads), tier=tier
            ),
        )
        for tier in spec.tiers
        if tier.computes
    ]
    served: dict[str, list[Process]] = {
        tier.name: [
            process(
                *("batcher", f"batcher{number if number > 1 else ''}-{tier.name}", next(free)),
                *("--tier", tier.name, "--workers", f"{HOST}:{worker.port}"),
                *(["--fake"] if spec.fake else _model_flags(spec, tier)),
                tier=tier,
            )
            for number in range(1, parallel + 1)
        ]
        for tier, worker in workers
    }
    for tier in spec.tiers:
        if not tier.computes:
            flags = ("--tier", tier.name, "--url", tier.url, "--model", tier.model)
            served[tier.name] = [process("upstream", f"upstream-{tier.name}", next(free), *flags, tier=tier)]
    routes = ",".join(
        f"{tier.name}={'+'.join(f'{HOST}:{each.port}' for each in served[tier.name])}" for tier in spec.tiers
    )
    router_port, gateway_port = spec.port or next(free), spec.gateway_port
    stages = [
        [worker for _, worker in workers],
        [each for tier in spec.tiers for each in served[tier.name]],
        [process("router", "router", router_port, "--tiers", routes, *several)],
    ]
    if gateway_port is not None:
        flags = ("--router", f"{HOST}:{router_port}", *several)
        stages.append([process("gateway", "gateway", gateway_port or next(free), *flags)])
    return stages


def _is_for(kind: str, name: str) -> bool:
    """Return whether a service shall have a variable.

    Variables HEADRACE_AUTH_* are for router and gateway: the services behind them have no tokens. The key of
    an upstream is for it alone.
    """
    if name.startswith("HEADRACE_AUTH_"):
        return kind in _EDGES
    return kind == "upstream" or name != API_KEY_FILE


def _on_vllm(spec: MeshSpec, tier: TierSpec | None) -> bool:
    return tier is not None and tier.engine == "vllm" and not spec.fake


def _model_flags(spec: MeshSpec, tier: TierSpec) -> list[str]:
    return ["--model", tier.model, "--cache", str(spec.cache)]


def _worker_flags(spec: MeshSpec, tier: TierSpec, threads: int) -> list[str]:
    """Return the flags of a tier's worker: its engine and model, and what they compute with."""
    device = [f"--device={spec.device}"] if spec.device else []
    dtype = [f"--dtype={spec.dtype}"] if spec.dtype else []
    if spec.fake:
        return [*spec.echo_flags, "--fake-step-seconds", str(spec.fake_step_seconds), *device, *dtype]
    if _on_vllm(spec, tier):
        arguments = [f"--engine-args={spec.vllm_args}"] if spec.vllm_args else []
        return ["--engine", "vllm", *arguments, *_model_flags(spec, tier)]
    return [*_model_flags(spec, tier), "--threads", str(threads), *device, *dtype]


def packages_of(spec: MeshSpec) -> Path:
    """Return the folder from which the interpreter with vLLM imports Headrace."""
    return spec.log_dir / "python"


def certificates_of(spec: MeshSpec) -> Path | None:
    """Return the folder of the mesh's certificates; None if it uses no TLS."""
    return spec.log_dir / "tls" if spec.tls else None


def _tls_flags(spec: MeshSpec, kind: str) -> list[str]:
    if (folder := certificates_of(spec)) is None:
        return []
    role = "batcher" if kind == "upstream" else kind  # the router calls both alike
    files = {
        "--tls-ca": folder / CA,
        "--tls-cert": cert_file(folder, role),
        "--tls-key": key_file(folder, role),
    }
    return [str(word) for pair in files.items() for word in pair]


def _threads(spec: MeshSpec, cores: int) -> int:
    computing, _ = _counts(spec)
    return spec.threads or worker_threads(cores, max(1, computing))


@asynccontextmanager
async def mesh(
    spec: MeshSpec,
    *,
    on_states: Callable[[Sequence[StartState]], None] = lambda states: None,
    notify: Callable[[str], None] = lambda line: None,
) -> AsyncGenerator[Running, None]:
    """Run the mesh of *spec* while the block runs. The block starts when every process is ready.

    on_states   called several times a second during the start
    notify      receives the notices of processes when all are ready, such as weights that are not used, and
                problems while they stop

    Raises BadSpec before a process is started, and ChildDied, which cancels the block, when a process ends.
    """
    require_free_ports(spec)
    try:
        spec.log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSpec(f"cannot write logs to {spec.log_dir}: {error.strerror}; see --log-dir") from error
    reader = None
    if (folder := certificates_of(spec)) is not None:
        issue(folder, keep_authority=False)  # nobody can issue more certificates
        reader = TlsReader(TlsFiles(folder / CA, cert_file(folder, CLIENT), key_file(folder, CLIENT)))
    if spec.vllm_python:
        vllm.link_package(packages_of(spec))
    available = cores()
    with reserved_ports(ports_needed(spec, available)) as ports:
        stages = plan_processes(spec, ports, cores=available)
        async with crew(stages, grace=spec.drain_seconds + _STOP_SECONDS, notify=notify) as running:
            try:
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(running.watch())
                    processes = [process for stage in stages for process in stage]
                    await until_ready(processes, on_states, host=HOST, tls=reader)
                    for process in processes:
                        for notice in notices_of(process.log):
                            notify(f"{process.name}: {notice}")
                    ports_by_name = {process.name: process.port for process in processes}
                    yield Running(
                        f"{HOST}:{ports_by_name['router']}",
                        f"http://{HOST}:{ports_by_name['gateway']}" if "gateway" in ports_by_name else "",
                        folder,
                        processes,
                        running.pids,
                    )
                    watch.cancel()
            except Exception as error:
                raise _root_cause(error, running) from error


def _root_cause(error: Exception, running: Crew) -> Exception:
    """Return the end of a child rather than the errors it caused, and unwrap groups of one exception."""
    leaf: Exception = error
    while isinstance(leaf, ExceptionGroup):
        deaths, _ = leaf.split(ChildDied)
        if deaths is None and len(leaf.exceptions) > 1:
            break
        leaf = (deaths or leaf).exceptions[0]
    return leaf if isinstance(leaf, ChildDied) else running.ended() or leaf
