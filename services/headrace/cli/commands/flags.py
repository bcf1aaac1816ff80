"""Flags that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from headrace.cli.launch.mesh import DEFAULT_TIERS

Target = Annotated[
    str, typer.Option(envvar="HEADRACE_TARGET", help="Router or batcher to call, as a gRPC target.")
]
Fake = Annotated[bool, typer.Option("--fake", help="Use echo engines instead of models; downloads nothing.")]
Tiers = Annotated[
    list[str] | None,
    typer.Option(
        "--tier",
        metavar="NAME=MODEL",
        help="A tier, smallest first; repeat the flag for more. MODEL is the name of a default model, a "
        f"folder, a .gguf file or a hub id. Default: "
        f"{', '.join(f'{tier.model} as {tier.name}' for tier in DEFAULT_TIERS)}",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="Device of the models: cpu (the default), cuda or cuda:N.")
]
Dtype = Annotated[
    Literal["auto", "int8", "bfloat16", "float32", "float16"],
    typer.Option(
        metavar="DTYPE",
        help="Data type of the computation: int8, bfloat16, float32 or float16; auto is int8 where the CPU "
        "and the model support it.",
    ),
]
Threads = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="CPU threads per worker; 0 divides the cores between the workers."),
]
Processes = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=0,
        max=64,
        help="Processes of the router, and batchers per tier; 0 uses the cores that the models leave.",
    ),
]
LogDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Folder for the logs of the processes. Default: a new folder in the cache."
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder for fetched models. Default: $HEADRACE_CACHE, $XDG_CACHE_HOME/headrace or "
        "~/.cache/headrace.",
    ),
]
Artifact = Annotated[
    Path | None, typer.Option(help="File of the scorer or check to use instead of the default one.")
]
DrainSeconds = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", min=0, help="Time for requests in flight to complete when the mesh stops."
    ),
]
