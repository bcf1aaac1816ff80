"""Measure the workload through router, batcher and worker: real processes on this machine, over gRPC."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.gpu import engines, limits
from benchmarks.gpu.report import Report
from benchmarks.gpu.requests import TEMPERATURE, Request, workload
from benchmarks.gpu.shapes import Shape, model_folder, text_of
from headrace.channel import open_channel
from headrace.cli.launch.mesh import HOST, reserved_ports
from headrace.client import Client, connect
from headrace.v1 import generation_pb2 as pb

_TIER = "only"
_STOP_SECONDS = 5.0
# All requests arrive at once, and each reserves the size of the longest message until it is complete.
_IN_FLIGHT = ("--max-inflight-megabytes", "1024")


@dataclass
class Answer:
    """When an answer's tokens arrived: seconds from the request to the first, and their number."""

    first: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0


def run(report: Report, shape: Shape | None) -> None:
    """Measure one model."""
    assert shape is not None
    # As `headrace bench`: with asyncio's own loop, the client would need most of the time of a core.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(report, shape))


async def _run(report: Report, shape: Shape) -> None:
    options = report.options
    folder = model_folder(shape, options.out / "models" / shape.name)
    requests = workload(shape, options.share, tiny=options.rehearse)
    began = time.perf_counter()
    with reserved_ports(3) as ports:
        async with _services(report, folder, ports) as target, connect(target) as client:
            report.row("time until all services are ready", time.perf_counter() - began, "s")
            warm_up = _messages(shape, [Request(request.ids, 4) for request in requests[:4]])
            messages = _messages(shape, requests)
            await _ask_all(client, warm_up, max(report.left, 5.0))
            began = time.perf_counter()
            answers = await _ask_all(client, messages, max(report.left - _STOP_SECONDS, 5.0))
            seconds = time.perf_counter() - began
    tokens = sum(answer.tokens for answer in answers)
    wrong = [
        index
        for index, (answer, request) in enumerate(zip(answers, requests, strict=True))
        if (answer.prompt_tokens, answer.tokens) != (len(request.ids), request.tokens)
    ]
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} of {len(requests)} answers have a wrong number of tokens: {wrong[:5]}"
        )
    rate = tokens / seconds
    ceilings = report.ceilings
    lengths = [(len(request.ids), request.tokens) for request in requests]
    report.row(
        f"whole mesh, {len(requests)} requests",
        rate,
        "tokens/s",
        limit=limits.workload_tokens_per_second(shape, ceilings, lengths) if ceilings else None,
        note=f"{tokens} tokens in {seconds:.1f} s, median time to first token "
        f"{statistics.median(answer.first for answer in answers):.2f} s",
    )
    alone = report.facts.get(f"workload {shape.name} {options.share:g}")
    if alone:
        report.row("whole mesh over engine alone", rate / alone, goal=limits.MESH.get(shape.name))


@asynccontextmanager
async def _services(report: Report, folder: Path, ports: Sequence[int]) -> AsyncIterator[str]:
    """Run the three services while the block runs. Returns the router's address."""
    options = report.options
    worker, batcher, router = ports
    sizes = engines.sizes(options)
    worker_flags = ["--model", str(folder), "--device", options.device, "--dtype", options.dtype]
    worker_flags += ["--max-running", str(sizes.max_running), "--step-tokens", str(sizes.step_tokens)]
    worker_flags += ["--context-length", str(sizes.context)]
    if options.rehearse:
        worker_flags.append(f"--kv-memory={engines.TINY_KV_GIB}")
    batcher_flags = ["--tier", _TIER, "--workers", f"{HOST}:{worker}", "--model", str(folder)]
    batcher_flags += ["--cache", str(folder / "cache"), *_IN_FLIGHT]
    router_flags = ["--tiers", f"{_TIER}={HOST}:{batcher}", *_IN_FLIGHT]
    async with (
        _service("benchmarks.gpu.processes.worker", worker, worker_flags, report) as starting_worker,
        _service("headrace.batcher", batcher, batcher_flags, report) as starting_batcher,
        _service("headrace.router", router, router_flags, report) as starting_router,
    ):
        for service in (starting_worker, starting_batcher, starting_router):
            await _until_ready(service, max(report.left, 5.0))
        yield f"{HOST}:{router}"


@dataclass(frozen=True)
class _Service:
    module: str
    port: int
    log: Path
    process: asyncio.subprocess.Process


@asynccontextmanager
async def _service(module: str, port: int, flags: Sequence[str], report: Report) -> AsyncIterator[_Service]:
    """Run one service while the block runs; it may not be ready when the block is entered."""
    log = report.options.out / f"{module.rpartition('.')[2]}-{report.model}.log"
    command = [sys.executable, "-m", module, "--host", HOST, "--port", str(port), "--drain-seconds", "1"]
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *command, *flags, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        yield _Service(module, port, log, process)
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _until_ready(service: _Service, seconds: float) -> None:
    """Wait until a service is ready. Raises RuntimeError if it ends, or is not ready after *seconds*."""
    ends = time.monotonic() + seconds
    asked = health_pb2.HealthCheckRequest(service="readiness")
    async with open_channel(f"{HOST}:{service.port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                if (await stub.Check(asked, timeout=1)).status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError:
                pass  # it does not listen yet
            if service.process.returncode is not None or time.monotonic() > ends:
                how = "is not ready in time" if service.process.returncode is None else "ended"
                raise RuntimeError(f"{service.module} {how}: {_last_line(service.log)}; see {service.log}")
            await asyncio.sleep(0.1)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no output"


def _messages(shape: Shape, requests: Sequence[Request]) -> list[pb.GenerateRequest]:
    return [
        pb.GenerateRequest(
            prompt=text_of(request.ids, shape.vocabulary),
            sampling=pb.Sampling(
                max_tokens=request.tokens, temperature=TEMPERATURE, ignore_eos=True, seed=index
            ),
        )
        for index, request in enumerate(requests)
    ]


async def _ask_all(client: Client, messages: Sequence[pb.GenerateRequest], seconds: float) -> list[Answer]:
    """Send all requests at once, and read the answers."""
    return list(await asyncio.gather(*(_ask(client, message, seconds) for message in messages)))


async def _ask(client: Client, message: pb.GenerateRequest, seconds: float) -> Answer:
    answer = Answer()
    began = time.perf_counter()
    async with aclosing(client.generate(message, timeout=seconds)) as stream:
        async for response in stream:
            if response.HasField("delta") and response.delta.token_count:
                if not answer.tokens:
                    answer.first = time.perf_counter() - began
                answer.tokens += response.delta.token_count
            elif response.HasField("finish"):
                answer.prompt_tokens = response.finish.usage.prompt_tokens
    return answer
