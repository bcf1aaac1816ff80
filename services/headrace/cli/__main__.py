"""The `headrace` command: register all commands."""

import io
import sys
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from headrace import propagation
from headrace.cli.commands.asking import chat, explain, feedback, tiers, top
from headrace.cli.commands.benching import bench
from headrace.cli.commands.fitting import calibrate, check, train
from headrace.cli.commands.replaying import replay
from headrace.cli.commands.running import certs, demo, fetch, unpack, up
from headrace.cli.commands.tokens import token
from headrace.cli.complaints import complain


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headrace {installed_version('headrace')}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""A gRPC mesh for LLM inference, on this machine or another.

    Start a mesh:  [bold]headrace up[/]   (add --fake to try it without models)

    Then, in another terminal:  [bold]headrace chat "Why is the sky blue?"[/]""",
)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options that precede the command."""


for panel, commands in (
    ("Run a mesh", (up, demo, fetch, unpack, certs)),
    ("Send requests to a mesh", (chat, explain, tiers, top, bench, feedback)),
    ("Fit the routing to your traffic", (calibrate, train, check, replay)),
):
    for command in commands:
        app.command(rich_help_panel=panel)(command)

app.add_typer(token, name="token", rich_help_panel="Run a mesh")


def main() -> None:
    """Run the command line."""
    # Replace characters that the terminal's encoding does not support with `?`.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if failure := propagation.problem():
        complain(failure)
        raise SystemExit(2)
    app()


if __name__ == "__main__":
    main()
