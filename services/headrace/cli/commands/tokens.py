"""Commands that manage the tokens of callers."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.complaints import complaining

token = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Make bearer tokens for callers.

    Example:  headrace token new search --file callers.toml""",
)


@token.callback()
def options() -> None:
    """Keep `new` a command of its own: without this, typer would merge it with the group."""


@token.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the caller, for logs.")],
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File of callers (--auth-tokens of the services) to add it to. Default: print the entry.",
        ),
    ] = None,
    tenant: Annotated[
        str, typer.Option(help="Tenant of its requests; * for any that a request names. Default: NAME.")
    ] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What it may do: generate, feedback or admin; repeat the flag for several. "
            "Default: generate and feedback."
        ),
    ] = None,
    max_priority: Annotated[int, typer.Option(min=0, max=9, help="Highest priority of its requests.")] = 5,
    quota: Annotated[str, typer.Option(help="Name of the limits of its tenant.")] = "",
    days: Annotated[int, typer.Option(min=0, help="Days after which it expires; 0: never.")] = 0,
) -> None:
    """Make a token and print it, once: the file contains only its hash.

    The services read the file again within seconds. To withdraw a token, delete its entry.

    Example:  headrace token new search --file callers.toml --days 90 > search.token
    """
    from headrace.cli.files.callers import add_token

    with complaining():
        made, entry = add_token(
            file,
            name=name,
            tenant=tenant or name,
            scopes=tuple(scope or ("generate", "feedback")),
            max_priority=max_priority,
            quota=quota,
            expires=datetime.now(UTC) + timedelta(days=days) if days else None,
        )
    typer.echo(made)
    if file is None:
        typer.echo(f"\nAdd this to the file of --auth-tokens:\n\n{entry}", err=True)
