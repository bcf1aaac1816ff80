"""Commands that bring a mesh up on this machine."""

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
    Threads,
    Tiers,
)
from headrace.cli.complaints import complaining
from headrace.cli.mesh import MeshSpec, parse_tiers
from headrace.cli.processes import log_folder
from headrace.cli.up import DEFAULT_PORT


def up(
    fake: Fake = False,
    tier: Tiers = None,
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Of the router; 0 picks a free one.")
    ] = (DEFAULT_PORT),
    device: Device = "",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    log_dir: LogDir = None,
    cache: Cache = None,
    drain_seconds: DrainSeconds = 10.0,
) -> None:
    """Start a mesh on this machine: a worker and a batcher per tier, and the router. Ctrl-C stops it.

    What the services can be told besides, `python -m headrace.router --help` and so on list; here it is told
    by variables:  HEADRACE_FEEDBACK=feedback.jsonl headrace up

    Example:  headrace up --fake

    Example:  headrace up --tier small=smollm2-135m-instruct --tier large=Qwen/Qwen2.5-1.5B-Instruct
    """
    from headrace.cli.up import prepare, run_until_signal
    from headrace.cli.up import up as run

    console = Console()
    with complaining():
        home = cache or models.cache_folder()
        spec = MeshSpec(
            cache=home,
            log_dir=log_dir or log_folder(home),
            tiers=parse_tiers(tier or [], fake=fake),
            fake=fake,
            port=port,
            device=device,
            dtype=dtype,
            threads=threads,
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
    """Bring a mesh up, ask it sixteen things, show figures and a trace, and take it down again.

    Example:  headrace demo --fake
    """
    from headrace.cli.demo import demo as run
    from headrace.cli.up import prepare, run_until_signal

    console = Console()
    finished = False

    async def note(spec: MeshSpec) -> None:
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
        run_until_signal(note(spec), lambda: console.print("stopping..."))
    if not finished:
        raise typer.Exit(1)


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help=f"Of {', '.join(models.DEFAULTS)}, or a hub id. None: those two.",
        ),
    ] = None,
    cache: Cache = None,
) -> None:
    """Download models, check them, and keep them for later.

    Example:  headrace fetch smollm2-135m-instruct
    """
    from headrace.cli.up import fetch_models

    console = Console()
    with complaining():
        paths = fetch_models(names or list(models.DEFAULTS), cache or models.cache_folder(), console)
    for name, path in paths.items():
        console.print(f"{name}: {path}", highlight=False, markup=False, soft_wrap=True)
