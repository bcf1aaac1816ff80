"""Measure what limits per tenant cost the router: CPU time per request without, with, and with shared limits.

`python -m benchmarks.quotas` runs three echo meshes as real processes, in turns in one run. In `shared`, the
router leases all that it admits from a keeper, which is a router of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.mesh.cpu import Cost, run_once, show
from benchmarks.mesh.systems import EngineSpec, System, in_turn, median_run, progress, serving, window
from headrace.cli.launch.mesh import HOST, reserved_ports

STEP_SECONDS = 0.01
WARM_UP_SECONDS = 2.0
QUOTAS = """
[default]
requests_per_minute = 10_000_000
tokens_per_minute = 10_000_000_000
concurrent_streams = 10_000
cost_per_day = 1_000_000_000
max_priority = 7
"""


@asynccontextmanager
async def keeping(port: int, quotas: Path) -> AsyncGenerator[None, None]:
    """Run a router that only keeps budgets."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace.router", "--port", str(port), "--tiers", f"none={HOST}:9"),
        *("--quotas", str(quotas), "--quota-peers", f"{HOST}:{port}"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


async def measure(arguments: argparse.Namespace) -> list[Cost]:
    """Return the median run of each system."""
    runs: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory() as folder, reserved_ports(1) as (port,):
        quotas = Path(folder) / "quotas.toml"
        quotas.write_text(QUOTAS)
        limited = {"HEADRACE_QUOTAS": str(quotas)}
        systems = [
            System("off"),
            System("on", environment=limited),
            System("shared", environment={**limited, "HEADRACE_QUOTA_PEERS": f"{HOST}:{port}"}),
        ]
        async with keeping(port, quotas), serving(systems, EngineSpec(STEP_SECONDS)) as served:
            for repetition in range(arguments.repeat):
                for name in in_turn(list(served), repetition):
                    if name not in runs:
                        await run_once(served[name], arguments.callers, WARM_UP_SECONDS)
                    async with window(served, arguments.patience) as measured:
                        run = await run_once(served[name], arguments.callers, arguments.seconds)
                    runs.setdefault(name, []).append(run)
                    router = run.seconds_per_request["router"] * 1e3
                    progress(
                        f"{name}, run {repetition + 1}: router {router:.3f} ms per request, "
                        f"{measured.others:.1f} cores used by others"
                    )
            return [median_run(runs[name], lambda run: run.seconds_per_request["router"]) for name in served]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--patience", type=float, default=5.0, help="seconds to wait for a quiet machine")
    costs = asyncio.run(measure(parser.parse_args()))
    show(costs)
    off, *others = (cost.seconds_per_request["router"] for cost in costs)
    for cost, seconds in zip(costs[1:], others, strict=True):
        print(f"{cost.what}: {(seconds / off - 1) * 100:+.1f} % CPU of the router per request")


if __name__ == "__main__":
    main()
