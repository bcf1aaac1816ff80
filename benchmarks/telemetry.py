"""Measure what telemetry costs: CPU time of a request in each service.

    python -m benchmarks.telemetry [--before CHECKOUT]

The echo mesh runs as real processes with each configuration of telemetry: with all traces and metrics, with
1 % of the traces and metrics, and with each alone. They export over OTLP to a collector in another process,
which discards what it receives. Beside each runs a mesh without telemetry, under the same load at the same
time, so that both find the same machine: from one minute to the next its speed may differ by more than
telemetry costs.

Each repetition starts new processes: two of the same code differ by a few percent, as their memory is laid
out differently. The CPU time is that of the processes under steady load, in which spans are exported as fast
as they end; so it contains what they use when they are idle, too. What telemetry adds is the mean, over the
repetitions, of the difference to the mesh beside it. Of two meshes, the one that starts first uses about
1.5 % more; so they take turns, and the number of repetitions should be even.

With --before, the services of another checkout are measured in turn with this checkout's. The column `others`
shows the cores that other processes used.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
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

WARM_UP_SECONDS = 6.0  # spans are exported every five seconds or more often
OUT = Path("build/bench-telemetry.json")

_SAMPLED = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"}
# The configurations by name, as variables beside those of `_pairs`.
CONFIGURATIONS = {
    "all traces, metrics": {},
    "1 % of traces, metrics": _SAMPLED,
    "all traces": {"OTEL_METRICS_EXPORTER": "none"},
    "1 % of traces": {**_SAMPLED, "OTEL_METRICS_EXPORTER": "none"},
    "metrics": {"OTEL_TRACES_EXPORTER": "none"},
}


@dataclass(frozen=True)
class Cost:
    """Of one mesh; `seconds_per_request` is CPU time by process."""

    requests: int
    seconds_per_request: dict[str, float]

    @property
    def services(self) -> float:
        """CPU seconds per request in all services, without the client."""
        return sum(self.seconds_per_request[kind] for kind in SERVICES)


@dataclass(frozen=True)
class Pair:
    """A mesh with telemetry, and the one without that ran beside it; others: the cores of other processes."""

    on: Cost
    off: Cost
    others: float

    @property
    def added(self) -> float:
        """The share of CPU time that telemetry adds."""
        return self.on.services / self.off.services - 1


async def measure(arguments: argparse.Namespace) -> dict[str, list[Pair]]:
    """Return the pairs of each configuration, in the order of the repetitions."""
    async with collector() as endpoint:
        pairs = _pairs(arguments, endpoint)
        runs: dict[str, list[Pair]] = {on.name: [] for on, _ in pairs}
        for repetition in range(arguments.repeat):
            for on, off in in_turn(pairs, repetition):
                both = in_turn([on, off], repetition)
                async with serving(both, EngineSpec(arguments.step_seconds)) as served:
                    runs[on.name].append(await _pair(served, on.name, off.name, arguments))
            figures = ", ".join(f"{name} {each[-1].added:+.1%}" for name, each in runs.items())
            progress(f"run {repetition + 1} of {arguments.repeat}: {figures}")
    return runs


def _pairs(arguments: argparse.Namespace, endpoint: str) -> list[tuple[System, System]]:
    """Return the systems with telemetry, each with the one without."""
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_METRIC_EXPORT_INTERVAL": "10000",
        "PYTHONHASHSEED": "0",
    }
    checkouts = [("", None), *([("before: ", arguments.before)] if arguments.before else [])]
    return [
        (
            System(f"{prefix}{name}", checkout, {**variables, **CONFIGURATIONS[name]}),
            System(f"{prefix}off", checkout, {**variables, "OTEL_SDK_DISABLED": "true"}),
        )
        for name in arguments.only or CONFIGURATIONS
        for prefix, checkout in checkouts
    ]


async def _pair(served: Mapping[str, Served], on: str, off: str, arguments: argparse.Namespace) -> Pair:
    """Put both meshes under load at the same time, and return the cost of each."""

    async def load(name: str, seconds: float) -> Cost:
        one = served[name]
        call = lambda number: ask(one.client, number, arguments.tokens)  # noqa: E731
        before = _cpu_seconds(one)
        done = len(await closed_loop(arguments.callers, seconds, call))
        after = _cpu_seconds(one)
        return Cost(done, {kind: (after[kind] - before[kind]) / done for kind in before})

    await asyncio.gather(load(on, WARM_UP_SECONDS), load(off, WARM_UP_SECONDS))
    async with window(served, arguments.patience) as measured:
        costs = await asyncio.gather(load(on, arguments.seconds), load(off, arguments.seconds))
    return Pair(*costs, measured.others)


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


def show(runs: dict[str, list[Pair]]) -> None:
    """Print a row for each configuration."""
    rows = []
    for name, pairs in runs.items():
        shares = sorted(pair.added for pair in pairs)
        off, on = (_medians([getattr(pair, side) for pair in pairs]) for side in ("off", "on"))
        rows.append(
            [
                name,
                f"{sum(off) * 1e3:.3f}",
                f"{sum(on) * 1e3:.3f}",
                *(f"{more * 1e3:.3f}" for more in on),
                f"{statistics.mean(shares):+.1%}",
                f"{shares[0]:+.1%} ... {shares[-1]:+.1%}",
                str(sum(pair.on.requests for pair in pairs)),
                f"{statistics.median(pair.others for pair in pairs):.2f}",
            ]
        )
    show_table(
        "CPU ms per request, medians; what is added is a mean",
        ("telemetry", "without", "with", *SERVICES, "added", "least ... most", "requests", "others"),
        rows,
    )


def _medians(costs: Sequence[Cost]) -> list[float]:
    """Return the CPU seconds per request of each service."""
    return [statistics.median(cost.seconds_per_request[kind] for cost in costs) for kind in SERVICES]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.telemetry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--before", type=Path, help="another checkout, whose services are also measured")
    add("--only", nargs="+", choices=CONFIGURATIONS, metavar="CONFIGURATION", help="by default all")
    add("--repeat", type=int, default=6, help="repetitions, an even number")
    add("--seconds", type=float, default=10.0, help="how long each configuration is measured in a repetition")
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
