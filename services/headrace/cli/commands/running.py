"""Commands that run a mesh on this machine."""

from typing import Annotated

import typer
from rich.console import Console

from headrace import models
from headrace.cli.commands.flags import (
    Cache,
    Device,
    DrainSeconds,
    Dtype,
    Fake,
    LogDir,
    Processes,
    Threads,
    Tiers,
)
from headrace.cli.complaints import complaining
from headrace.cli.launch.mesh import MeshSpec, parse_tiers
from headrace.cli.launch.processes import log_folder
from headrace.cli.launch.up import DEFAULT_PORT


def up(
    fake: Fake = False,
    tier: Tiers = None,
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Port of the router; 0 for a free one.")
    ] = (DEFAULT_PORT),
    metrics_port: Annotated[
        int,
        typer.Option(
            metavar="PORT",
            min=0,
            max=65000,
            envvar="HEADRACE_METRICS_PORT",
            help="Serve metrics to Prometheus: the router on this port, the others on the ports after it.",
        ),
    ] = 0,
    device: Device = "",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    processes: Processes = 0,
    log_dir: LogDir = None,
    cache: Cache = None,
    drain_seconds: DrainSeconds = 10.0,
) -> None:
    """Start a mesh on this machine: per tier a worker and batchers, and the router. Ctrl-C stops it.

    Environment variables set further settings of the services, which `python -m headrace.router --help` and
    so on list:  HEADRACE_FEEDBACK=feedback.jsonl headrace up

    Example:  headrace up --fake

    Example:  headrace up --tier small=smollm2-135m-instruct --tier large=Qwen/Qwen2.5-1.5B-Instruct
    """
    from headrace.cli.launch.up import prepare, run_until_signal
    from headrace.cli.launch.up import up as run

    console = Console()
    with complaining():
        home = cache or models.cache_folder()
        spec = MeshSpec(
            cache=home,
            log_dir=log_dir or log_folder(home),
            tiers=parse_tiers(tier or [], fake=fake),
            fake=fake,
            port=port,
            metrics_port=metrics_port,
            device=device,
            dtype=dtype,
            threads=threads,
            processes=processes,
            drain_seconds=drain_seconds,
        )
        prepare(spec, console)
        run_until_signal(run(spec, console), lambda: console.print("stopping..."))


def demo(
    fake: Fake = False,
    tier: Tiers = None,
    device: Device = "",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    log_dir: LogDir = None,
    cache: Cache = None,
) -> None:
    """Start a mesh, send it sixteen prompts, show figures and a trace, and stop the mesh.

    Example:  headrace demo --fake
    """
    from headrace.cli.demo.demo import demo as run
    from headrace.cli.launch.up import prepare, run_until_signal

    console = Console()
    finished = False

    async def run_demo(spec: MeshSpec) -> None:
        nonlocal finished
        finished = await run(spec, console)

    with complaining():
        home = cache or models.cache_folder()
        spec = MeshSpec(
            cache=home,
            log_dir=log_dir or log_folder(home),
            tiers=parse_tiers(tier or [], fake=fake),
            fake=fake,
            device=device,
            dtype=dtype,
            threads=threads,
        )
        prepare(spec, console)
        run_until_signal(run_demo(spec), lambda: console.print("stopping..."))
    if not finished:
        raise typer.Exit(1)


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help=f"{' or '.join(models.DEFAULTS)}, or a hub id. Default: the first two.",
        ),
    ] = None,
    cache: Cache = None,
) -> None:
    """Download models, verify them, and keep them in the cache.

    Example:  headrace fetch smollm2-135m-instruct
    """
    from headrace.cli.launch.up import fetch_models

    console = Console()
    with complaining():
        paths = fetch_models(names or list(models.DEFAULTS), cache or models.cache_folder(), console)
    for name, path in paths.items():
        console.print(f"{name}: {path}", highlight=False, markup=False, soft_wrap=True)
