"""Flags that more than one command takes."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from headrace.cli.mesh import DEFAULT_TIERS

Target = Annotated[
    str, typer.Option(envvar="HEADRACE_TARGET", help="Router or batcher to ask, as a gRPC target.")
]
Fake = Annotated[bool, typer.Option("--fake", help="Echo engines instead of models: nothing to download.")]
Tiers = Annotated[
    list[str] | None,
    typer.Option(
        "--tier",
        metavar="NAME=MODEL",
        help="A tier, smallest first; repeat it for more. MODEL is a default's name, a folder, a .gguf "
        f"file or a hub id. Default: {', '.join(f'{tier.model} as {tier.name}' for tier in DEFAULT_TIERS)}",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="Where models run: cpu (unless told), cuda or cuda:N.")
]
Dtype = Annotated[
    Literal["auto", "int8", "bfloat16", "float32", "float16"],
    typer.Option(
        metavar="DTYPE",
        help="What is computed in: int8, bfloat16, float32, float16; auto takes int8 on CPUs that multiply "
        "it, for models that can.",
    ),
]
Threads = Annotated[
    int, typer.Option(metavar="N", min=0, help="CPU threads per worker; 0 shares the cores out between them.")
]
LogDir = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder for the processes' logs. Default: a new one in the cache."),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder for fetched models. Default: $HEADRACE_CACHE, $XDG_CACHE_HOME/headrace or "
        "~/.cache/headrace.",
    ),
]
Artifact = Annotated[Path | None, typer.Option(help="A model file in place of the one that is shipped.")]
DrainSeconds = Annotated[
    float,
    typer.Option(metavar="SECONDS", min=0, help="How long requests in flight may go on when the mesh stops."),
]
