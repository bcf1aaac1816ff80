"""Commands that run a mesh on this machine."""

from pathlib import Path
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
    VllmArgs,
    VllmPython,
)
from headrace.cli.complaints import complain, complaining
from headrace.cli.launch.certificates import CA, DOMAIN, HOSTS, ROLES, issue
from headrace.cli.launch.mesh import MeshSpec
from headrace.cli.launch.processes import log_folder
from headrace.cli.launch.tiers import BadSpec, parse_tiers
from headrace.cli.launch.up import DEFAULT_GATEWAY_PORT, DEFAULT_PORT
from headrace.cli.launch.vllm import find_python


def up(
    fake: Fake = False,
    tier: Tiers = None,
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Port of the router; 0 for a free one.")
    ] = (DEFAULT_PORT),
    gateway_port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            min=0,
            max=65535,
            help="Port of the gateway, which serves OpenAI's API over HTTP; 0 for a free one. Default: "
            f"{DEFAULT_GATEWAY_PORT}, or a free one if it is in use.",
        ),
    ] = None,
    no_gateway: Annotated[
        bool, typer.Option("--no-gateway", help="Start no gateway: the mesh is called over gRPC only.")
    ] = False,
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
    vllm_python: VllmPython = "",
    vllm_args: VllmArgs = "",
    log_dir: LogDir = None,
    cache: Cache = None,
    drain_seconds: DrainSeconds = 10.0,
    tls: Annotated[
        bool,
        typer.Option(
            "--tls",
            help="Use TLS for all connections, with client certificates. Their authority is made at the "
            "start and thrown away; commands on this machine find their certificate by themselves.",
        ),
    ] = False,
) -> None:
    """Start a mesh on this machine: per tier a worker and batchers or an upstream, the router, the gateway.

    Ctrl-C stops it.

    Environment variables set further settings of the services, which `python -m headrace.router --help` and
    so on list:  HEADRACE_FEEDBACK=feedback.jsonl headrace up

    Example:  headrace up --fake

    Example:  headrace up --tier small=smollm2-135m-instruct --tier large=Qwen/Qwen2.5-1.5B-Instruct

    Example:  headrace up --tier small=vllm:Qwen/Qwen3-1.7B --vllm-python /opt/vllm/bin/python

    Example:  headrace up --tier small=smollm2-135m-instruct --tier large=gpt-5@https://api.openai.com/v1
    """
    from headrace.cli.launch.up import gateway_port as usual_gateway_port
    from headrace.cli.launch.up import prepare, run_until_signal
    from headrace.cli.launch.up import up as run

    console = Console()
    with complaining():
        if no_gateway and gateway_port is not None:
            raise BadSpec("--gateway-port and --no-gateway exclude each other")
        if not no_gateway and gateway_port is None:
            gateway_port = usual_gateway_port(port, console)
        home = cache or models.cache_folder()
        spec = MeshSpec(
            cache=home,
            log_dir=log_dir or log_folder(home),
            tiers=parse_tiers(tier or [], fake=fake),
            fake=fake,
            port=port,
            gateway_port=gateway_port,
            metrics_port=metrics_port,
            device=device,
            dtype=dtype,
            threads=threads,
            processes=processes,
            vllm_python=find_python(vllm_python),
            vllm_args=vllm_args,
            drain_seconds=drain_seconds,
            tls=tls,
        )
        spec = prepare(spec, console)
        run_until_signal(run(spec, console), lambda: console.print("stopping..."))


def certs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files are written.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="Roles, each with a suffix where there are several: gateway, router, batcher-small, "
            "worker-small, admin. Other names are callers of the router. Default: "
            f"{', '.join(ROLES[:-1])} and {ROLES[-1]}.",
        ),
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Name or IP address at which the servers are called; repeat the flag for more. Default: "
            "this machine.",
        ),
    ] = None,
    days: Annotated[float, typer.Option(min=0.001, help="Days until the certificates expire.")] = 7.0,
    domain: Annotated[
        str, typer.Option(metavar="URI", help="What precedes the name in a certificate's SPIFFE URI.")
    ] = DOMAIN,
) -> None:
    """Issue certificates for a mesh, by an authority in FOLDER, which is made if there is none.

    Running the command again replaces the certificates; services that run read the new ones.

    Example:  headrace certs tls router batcher-small worker-small --host router.internal --host 10.0.0.7
    """
    console = Console()
    with complaining():
        try:
            written = issue(folder, names or ROLES, hosts=host or HOSTS, days=days, domain=domain)
        except ValueError as error:
            complain(str(error))
            raise typer.Exit(2) from None
    for path in (folder / CA, *written):
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)


def demo(
    fake: Fake = False,
    tier: Tiers = None,
    device: Device = "",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    vllm_python: VllmPython = "",
    vllm_args: VllmArgs = "",
    log_dir: LogDir = None,
    cache: Cache = None,
) -> None:
    """Start a mesh, send it prompts, show figures and a trace of each tier, call it over HTTP, and stop it.

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
            gateway_port=0,
            device=device,
            dtype=dtype,
            threads=threads,
            vllm_python=find_python(vllm_python),
            vllm_args=vllm_args,
        )
        spec = prepare(spec, console)
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
    from headrace.cli.launch.model_files import fetch_models

    console = Console()
    with complaining():
        paths = fetch_models(names or list(models.DEFAULTS), cache or models.cache_folder(), console)
    for name, path in paths.items():
        console.print(f"{name}: {path}", highlight=False, markup=False, soft_wrap=True)


def unpack(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help=f"{' or '.join(models.DEFAULTS)}, or a .gguf file."),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make; must not exist.")],
    cache: Cache = None,
) -> None:
    """Write a .gguf file as a folder in bfloat16, for engines that read no such files, such as vLLM.

    The folder is in transformers' format: weights as safetensors, configuration, tokenizer, chat template.
    `headrace up --tier NAME=vllm:MODEL` does so by itself, once, in the cache.

    Example:  headrace unpack smollm2-135m-instruct models/smollm2
    """
    from headrace.cli.launch.model_files import unpack as run

    console = Console()
    with complaining():
        path = run(model, cache or models.cache_folder(), console, folder)
    console.print(str(path), highlight=False, markup=False, soft_wrap=True)
