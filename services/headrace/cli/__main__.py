"""The `headrace` command: which commands there are."""

import typer

from headrace.cli.commands.asking import chat, explain, feedback, tiers, top
from headrace.cli.commands.fitting import calibrate, check, train
from headrace.cli.commands.running import demo, fetch, up

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""A gRPC mesh for LLM inference, on this machine or another.

    Bring one up:  [bold]headrace up[/]   (add --fake to try it without any model)

    Then, in another terminal:  [bold]headrace chat "Why is the sky blue?"[/]""",
)

for panel, commands in (
    ("Run a mesh", (up, demo, fetch)),
    ("Ask it", (chat, explain, tiers, top, feedback)),
    ("Fit the routing to your own traffic", (calibrate, train, check)),
):
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
