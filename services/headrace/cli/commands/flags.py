"""Flags that several commands have."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headrace.cli.calls.connection import Connection
from headrace.cli.launch.tiers import DEFAULT_TIERS
from headrace.cli.launch.up import DEFAULT_TARGET
from headrace.routing.scoring.score import Objective

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
        "folder, a .gguf file or a hub id. NAME=vllm:MODEL computes with vLLM. NAME=MODEL@URL asks a service "
        "with OpenAI's API, with the key in the file HEADRACE_API_KEY_FILE if it needs one. Default: "
        f"{', '.join(f'{tier.model} as {tier.name}' for tier in DEFAULT_TIERS)}",
    ),
]
VllmPython = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        envvar="HEADRACE_VLLM_PYTHON",
        help="Interpreter of an environment with vLLM, for tiers on it. Default: this one.",
    ),
]
VllmArgs = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        envvar="HEADRACE_VLLM_ARGS",
        help="Arguments for vLLM, as after `vllm serve MODEL`, such as '--gpu-memory-utilization 0.4'.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        envvar="HEADRACE_DEVICE",
        help="Device of the models: cpu (the default), cuda or cuda:N. vLLM chooses its own.",
    ),
]
Dtype = Annotated[
    Literal["auto", "int8", "bfloat16", "float32", "float16"],
    typer.Option(
        metavar="DTYPE",
        help="Data type of the computation: int8, bfloat16, float32 or float16; auto is bfloat16 on GPUs, "
        "and int8 where the CPU and the model support it.",
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
Aim = Annotated[
    Objective,
    typer.Option(
        "--objective",
        help="What a larger tier shall gain: right answers, answers that people like better, or both. Use "
        "the router's. A refitted scorer ignores it.",
    ),
]
DrainSeconds = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", min=0, help="Time for requests in flight to complete when the mesh stops."
    ),
]


_TlsFile = functools.partial(typer.Option, metavar="FILE", rich_help_panel="TLS")
_ConnectionFlags = {
    "target": (Target, DEFAULT_TARGET),
    "token_file": (
        Annotated[
            Path | None,
            typer.Option(
                metavar="FILE", envvar="HEADRACE_TOKEN_FILE", help="File with the bearer token of the caller."
            ),
        ],
        None,
    ),
    "plaintext_token": (
        Annotated[
            bool,
            typer.Option(
                "--plaintext-token", help="Send the token without TLS also to another machine, unencrypted."
            ),
        ],
        False,
    ),
    "tls_ca": (
        Annotated[
            Path | None,
            _TlsFile(
                envvar="HEADRACE_TLS_CA",
                help="Authorities that sign the server's certificate; the server is then called over TLS. A "
                "mesh that `headrace up --tls` runs on this machine needs none of these options.",
            ),
        ],
        None,
    ),
    "tls_cert": (
        Annotated[
            Path | None,
            _TlsFile(envvar="HEADRACE_TLS_CERT", help="Client certificate, if the server requires one."),
        ],
        None,
    ),
    "tls_key": (
        Annotated[
            Path | None,
            _TlsFile(envvar="HEADRACE_TLS_KEY", help="Private key of the client certificate."),
        ],
        None,
    ),
    "tls_server_name": (
        Annotated[
            str,
            typer.Option(
                envvar="HEADRACE_TLS_SERVER_NAME",
                metavar="NAME",
                rich_help_panel="TLS",
                help="The name in the server's certificate. Default: the host of --target.",
            ),
        ],
        "",
    ),
    "tls": (
        Annotated[
            bool,
            typer.Option(
                "--tls", rich_help_panel="TLS", help="Use TLS with public authorities, without --tls-ca."
            ),
        ],
        False,
    ),
}


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a connection, in place of its parameter `connection: Connection`."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        given = {name: options.pop(name) for name in _ConnectionFlags}
        connection = Connection(
            target=given["target"],
            ca=given["tls_ca"],
            cert=given["tls_cert"],
            key=given["tls_key"],
            server_name=given["tls_server_name"],
            tls=given["tls"],
            token_file=given["token_file"],
            plaintext_token=given["plaintext_token"],
        )
        command(connection=connection.completed(), **options)

    own = [one for name, one in inspect.signature(command).parameters.items() if name != "connection"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in _ConnectionFlags.items()
    ]
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own] + added
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # inspect reads it
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run
