"""Commands that fit the routing to the user's own traffic, and judge files of it; none needs a mesh."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cli.commands.flags import Artifact
from headrace.cli.complaints import complain, complaining


def calibrate(
    traffic: Annotated[
        Path,
        typer.Argument(help='Rows of JSON with "prompt", and "small_ok", "large_ok" if there are labels.'),
    ],
    share: Annotated[
        str, typer.Option(help="Wanted share of calls, 0 to 1, per tier after the first: 0.3 or 0.2,0.1.")
    ] = "",
    quality: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Instead of that, how much of the gap between smallest and largest tier to keep.",
        ),
    ] = None,
    tiers: Annotated[str, typer.Option(help="Names, smallest first.")] = "small,large",
    costs: Annotated[
        str,
        typer.Option(help="What a call costs per tier, in any unit. Default: each tier ten times the last."),
    ] = "",
    out: Annotated[Path, typer.Option(help="The file for the router.")] = Path("calibration.json"),
    png: Annotated[Path | None, typer.Option(help="Draw the trade-off into this file.")] = None,
    artifact: Artifact = None,
) -> None:
    """Turn your own traffic into thresholds, for a wanted share of large calls or a wanted quality.

    Example:  headrace calibrate traffic.jsonl --share 0.3

    Example:  headrace calibrate labelled.jsonl --quality 0.9 --png curve.png
    """
    from headrace.cli.calibrate import calibrate as run
    from headrace.routing.artifact import BadArtifact
    from headrace.routing.calibration import BadCalibration

    names = [name.strip() for name in tiers.split(",")]
    try:
        shares = [float(part) for part in share.split(",")] if share else None
        prices = (
            [float(part) for part in costs.split(",")] if costs else [10.0**at for at in range(len(names))]
        )
    except ValueError:
        complain("--share and --costs are numbers with commas between them")
        raise typer.Exit(2) from None
    if (shares is None) == (quality is None):
        complain("say either --share or --quality")
        raise typer.Exit(2)
    named = len(names) >= 2 and all(names) and len(set(names)) == len(names)
    priced = len(prices) == len(names) and all(0 <= price < math.inf for price in prices) and prices[-1]
    if not (named and priced):
        complain("--tiers names two tiers or more, and --costs has one number for each, the last above 0")
        raise typer.Exit(2)
    try:
        run(
            traffic,
            tiers=names,
            costs=prices,
            shares=shares,
            quality=quality,
            out=out,
            png=png,
            artifact=artifact,
            console=Console(),
        )
    except (BadArtifact, BadCalibration) as error:
        complain(str(error))
        raise typer.Exit(2) from None


def train(
    rows: Annotated[
        str,
        typer.Argument(metavar="ROWS", help="Rows of prompt, small_ok and large_ok; - is standard input."),
    ],
    out: Annotated[Path, typer.Option(help="Where to write the refitted artifact, for a router's --scorer.")],
    tiers: Annotated[
        str, typer.Option(help="The smaller and the larger tier: NAME_ok is read.")
    ] = "small,large",
    artifact: Artifact = None,
) -> None:
    """Refit the router's score to outcomes of your own: how each tier answered, 0 (badly) to 1 (well).

    A tier may have its say in a row of its own, as in the router's --feedback file: prompts are joined.
    Two hundred prompts bring most of what can be had. What is shipped stays the prior, against harm by few.

    Example:  headrace train outcomes.jsonl --out scorer.json
    """
    from headrace.cli.offline import refit_and_tell

    with complaining():
        refit_and_tell(rows, out, tiers, artifact, Console(highlight=False))


def check(
    jsonl: Annotated[
        str, typer.Option(metavar="FILE", help="Rows of id, prompt and draft; - is standard input.")
    ],
    artifact: Artifact = None,
) -> None:
    """Judge drafted answers; no mesh is needed. The higher the score, the more a larger tier is needed.

    Rows may also say "finished" (did the model end by itself?), "logprobs" (of the draft's tokens) and
    "samples" (other answers of the same model, drawn at random, to compare the draft with).

    Example:  headrace check --jsonl drafts.jsonl
    """
    from headrace.cli.offline import print_checks

    with complaining():
        print_checks(jsonl, artifact)
