"""Measure what telemetry costs: CPU time of a request in each service, and tokens per second.

    python -m benchmarks.telemetry [--before CHECKOUT]

The echo mesh runs as real processes, once for each configuration: without telemetry, with all traces and
metrics, with 1 % of the traces and metrics, and with each alone. They export over OTLP to a collector in
another process, which discards what it receives.

Each repetition starts new processes: two of the same code differ by a few percent, as their memory is laid
out differently. It consists of turns of half a second, in which one mesh after the other is under load, so
that all find the same machine. The CPU time of a mesh is that of its processes during the repetition, until
their last spans are exported, without what they use when they are idle. What telemetry adds is the median,
over the repetitions, of the difference to the mesh without telemetry.

With --before, the services of another checkout are measured in turn with this checkout's. The column `others`
shows the cores that other processes used; CPU time is little affected by them, tokens per second are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent import futures
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc

from benchmarks import machine
from benchmarks.mesh.answers import ask, closed_loop
from benchmarks.mesh.cpu import SERVICES
from benchmarks.mesh.systems import EngineSpec, Served, System, in_turn, progress, serving, window
from benchmarks.mesh.tables import show_table

OFF = "off"
WARM_UP_SECONDS = 2.0
TURN_SECONDS = 0.5
IDLE_SECONDS = 5.0
EXPORT_SECONDS = 5.0  # spans are exported at least this often, by default
OUT = Path("build/bench-telemetry.json")

_SAMPLED = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"}
# The configurations by name, as variables beside those of `_exporting`.
CONFIGURATIONS = {
    OFF: {"OTEL_SDK_DISABLED": "true"},
    "all traces, metrics": {},
    "1 % of traces, metrics": _SAMPLED,
    "all traces": {"OTEL_METRICS_EXPORTER": "none"},
    "1 % of traces": {**_SAMPLED, "OTEL_METRICS_EXPORTER": "none"},
    "metrics": {"OTEL_TRACES_EXPORTER": "none"},
}


@dataclass(frozen=True)
class Cost:
    """One run; `seconds_per_request` is CPU time by process."""

    what: str
    requests: int
    tokens_per_second: float
    seconds_per_request: dict[str, float]
    others: float

    @property
    def services(self) -> float:
        """CPU seconds per request in all services, without the client."""
        return sum(self.seconds_per_request[kind] for kind in SERVICES)


def added(cost: Sequence[Cost], off: Sequence[Cost]) -> float:
    """Return the median share of CPU time that is added to the run without telemetry of each repetition."""
    return statistics.median(one.services / base.services - 1 for one, base in zip(cost, off, strict=True))


async def measure(arguments: argparse.Namespace) -> dict[str, list[Cost]]:
    """Return the runs of each configuration, in the order of the repetitions."""
    runs: dict[str, list[Cost]] = {}
    async with collector() as endpoint:
        systems = _systems(arguments, endpoint)
        for repetition in range(arguments.repeat):
            async with serving(in_turn(systems, repetition), EngineSpec(arguments.step_seconds)) as served:
                for one in served.values():
                    await _load(one, arguments, WARM_UP_SECONDS)
                costs = await _repetition(served, arguments, await _idle(served))
            for system in systems:
                runs.setdefault(system.name, []).append(costs[system.name])
            figures = ", ".join(f"{name} {cost.services * 1e3:.3f}" for name, cost in costs.items())
            progress(f"run {repetition + 1} of {arguments.repeat}, ms per request: {figures}")
    return runs


def _systems(arguments: argparse.Namespace, endpoint: str) -> list[System]:
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_METRIC_EXPORT_INTERVAL": "10000",
    }
    checkouts = [("", None), *([("before: ", arguments.before)] if arguments.before else [])]
    return [
        System(f"{prefix}{name}", checkout, {**variables, **more, "PYTHONHASHSEED": "0"})
        for name, more in CONFIGURATIONS.items()
        for prefix, checkout in checkouts
        if name in (arguments.only or [*CONFIGURATIONS]) or name == OFF
    ]


async def _load(served: Served, arguments: argparse.Namespace, seconds: float) -> int:
    """Return the number of requests that were answered."""
    call = lambda number: ask(served.client, number, arguments.tokens)  # noqa: E731
    return len(await closed_loop(arguments.callers, seconds, call))


async def _idle(served: Mapping[str, Served]) -> dict[str, dict[str, float]]:
    """Return the cores that each process uses without requests, such as for health checks."""
    await asyncio.sleep(EXPORT_SECONDS + 1)
    before, began = {name: _cpu_seconds(one) for name, one in served.items()}, time.perf_counter()
    await asyncio.sleep(IDLE_SECONDS)
    took = time.perf_counter() - began
    return {
        name: {kind: (used - before[name][kind]) / took for kind, used in _cpu_seconds(one).items()}
        for name, one in served.items()
    }


async def _repetition(
    served: Mapping[str, Served], arguments: argparse.Namespace, idle: Mapping[str, Mapping[str, float]]
) -> dict[str, Cost]:
    done, busy = dict.fromkeys(served, 0), dict.fromkeys(served, 0.0)
    async with window(served, arguments.patience) as measured:
        before, began = {name: _cpu_seconds(one) for name, one in served.items()}, time.perf_counter()
        for turn in range(arguments.turns):
            for name in in_turn(list(served), turn):
                started = time.perf_counter()
                done[name] += await _load(served[name], arguments, TURN_SECONDS)
                busy[name] += time.perf_counter() - started
        await asyncio.sleep(EXPORT_SECONDS + 1)  # until the last spans are exported
        took = time.perf_counter() - began
        after = {name: _cpu_seconds(one) for name, one in served.items()}
    return {
        name: Cost(
            name,
            done[name],
            done[name] * arguments.tokens / busy[name],
            {
                kind: (after[name][kind] - before[name][kind] - cores * took) / done[name]
                for kind, cores in idle[name].items()
            },
            measured.others,
        )
        for name in served
    }


def _cpu_seconds(served: Served) -> dict[str, float]:
    """Return the CPU time of each service's threads: by the scheduler, since psutil counts ticks of 10 ms."""
    used = {}
    for kind, process in served.processes.items():
        threads = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
        used[kind] = sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9
    return used


@asynccontextmanager
async def collector() -> AsyncGenerator[str, None]:
    """Run a collector in a process of its own that discards what it receives; yield its endpoint."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.telemetry", "--collect"), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    try:
        async with asyncio.timeout(30):
            port = int(await child.stdout.readline())
        yield f"http://127.0.0.1:{port}"
    finally:
        child.kill()
        await child.wait()


def collect() -> None:
    """Accept every OTLP export over gRPC, and discard it unread; print the port."""

    class Handler(grpc.GenericRpcHandler):
        def service(
            self, handler_call_details: grpc.HandlerCallDetails
        ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
            return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")

    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[Handler()])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


def show(runs: dict[str, list[Cost]]) -> None:
    """Print a row for each configuration."""
    rows = []
    for name, each in runs.items():
        before = name.startswith("before: ")
        off = runs["before: " + OFF if before else OFF]
        median = sorted(each, key=lambda run: run.services)[len(each) // 2]
        rates = statistics.median(run.tokens_per_second for run in each)
        rows.append(
            [
                name,
                f"{median.services * 1e3:.3f}",
                "" if each is off else f"{added(each, off):+.1%}",
                *(f"{median.seconds_per_request[kind] * 1e3:.3f}" for kind in SERVICES),
                f"{rates:,.0f}",
                str(sum(run.requests for run in each)),
                f"{statistics.median(run.others for run in each):.2f}",
            ]
        )
    show_table(
        "CPU ms per request, medians",
        ("telemetry", "services", "added", *SERVICES, "tokens/s", "requests", "others"),
        rows,
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.telemetry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--before", type=Path, help="another checkout, whose services are also measured")
    add("--only", nargs="+", choices=CONFIGURATIONS, metavar="CONFIGURATION", help="beside 'off'")
    add("--repeat", type=int, default=9, help="repetitions")
    add("--turns", type=int, default=12, help="turns of each configuration in a repetition")
    add("--callers", type=int, default=16, help="callers, each of which makes one call after the other")
    add("--tokens", type=int, default=16, help="tokens per answer")
    add("--step-seconds", type=float, default=0.01, help="time of an engine step")
    add(
        "--patience",
        type=float,
        default=5.0,
        help="seconds to wait for a quiet machine before each repetition",
    )
    add("--collect", action="store_true", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure all configurations, print the table, and write build/bench-telemetry.json."""
    arguments = parser().parse_args()
    if arguments.collect:
        collect()
        return
    runs = asyncio.run(measure(arguments))
    show(runs)
    written = {name: [asdict(run) for run in each] for name, each in runs.items()}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"machine": machine.describe(), "runs": written}, indent=1))
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
