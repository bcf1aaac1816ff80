"""Commands that fit the routing to the user's traffic, or check a file of it. They need no mesh."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cli.commands.flags import Aim, Artifact
from headrace.cli.complaints import complain, complaining


def calibrate(
    traffic: Annotated[
        Path,
        typer.Argument(
            help='JSON Lines with "prompt" or "messages", and optionally labels "small_ok" and "large_ok".'
        ),
    ],
    share: Annotated[
        str,
        typer.Option(help="Desired share of calls, 0 to 1, of each tier after the first: 0.3 or 0.2,0.1."),
    ] = "",
    quality: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Instead of --share, the part of the gap between smallest and largest tier to recover.",
        ),
    ] = None,
    tiers: Annotated[str, typer.Option(help="Names of the tiers, smallest first.")] = "small,large",
    costs: Annotated[
        str,
        typer.Option(
            help="Cost of a call per tier, in any unit. Default: each tier ten times the previous one."
        ),
    ] = "",
    out: Annotated[Path, typer.Option(help="Output file, for --calibration of a router.")] = Path(
        "calibration.json"
    ),
    png: Annotated[Path | None, typer.Option(help="Write a picture of the trade-off to this file.")] = None,
    artifact: Artifact = None,
    objective: Aim = "both",
) -> None:
    """Derive thresholds from your traffic, for a desired share of large calls or a desired quality.

    Example:  headrace calibrate traffic.jsonl --share 0.3

    Example:  headrace calibrate labelled.jsonl --quality 0.9 --png curve.png
    """
    from headrace.cli.files.calibrate import calibrate as run
    from headrace.routing.artifact import BadArtifact
    from headrace.routing.calibration import BadCalibration

    names = [name.strip() for name in tiers.split(",")]
    try:
        shares = [float(part) for part in share.split(",")] if share else None
        prices = (
            [float(part) for part in costs.split(",")] if costs else [10.0**at for at in range(len(names))]
        )
    except ValueError:
        complain("--share and --costs must be numbers separated by commas")
        raise typer.Exit(2) from None
    if (shares is None) == (quality is None):
        complain("give one of --share and --quality")
        raise typer.Exit(2)
    named = len(names) >= 2 and all(names) and len(set(names)) == len(names)
    priced = len(prices) == len(names) and all(0 <= price < math.inf for price in prices) and prices[-1]
    if not (named and priced):
        complain("--tiers needs two or more names, and --costs one number for each, the last above 0")
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
            objective=objective,
            console=Console(),
        )
    except (BadArtifact, BadCalibration) as error:
        complain(str(error))
        raise typer.Exit(2) from None


def train(
    rows: Annotated[
        str,
        typer.Argument(
            metavar="ROWS",
            help="JSON Lines with prompt or messages, and NAME_ok of any of the tiers; - is standard input.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output file, for --scorer of a router.")],
    tiers: Annotated[
        str, typer.Option(help="Names of the tiers, smallest first; their labels are NAME_ok.")
    ] = "small,large",
    half_life_days: Annotated[
        float,
        typer.Option(
            min=0.01, help="Age, before the newest row, at which an outcome with a time counts half."
        ),
    ] = 30.0,
    most_per_tenant: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1,
            help="Share of a tier's outcomes that those of one tenant may count for; 1 trusts all tenants.",
        ),
    ] = 0.2,
    artifact: Artifact = None,
) -> None:
    """Refit the score of the router to your outcomes, and learn how likely each tier is to answer well.

    An outcome is the quality of a tier's answer, 0 to 1. A row may have those of one tier, some or all.
    Optional fields are NAME_tokens (length of the answer), tenant, time (in seconds since 1970, or as
    2026-11-28T20:00Z) and what else the router's --feedback file has. Rows with the same prompt are merged.

    The score needs outcomes of the first and the last tier for the same prompts: 200 give most of the
    improvement. The chance of success needs outcomes of each tier for any prompts, 50 or more of each. With
    it, a router chooses by expected quality and cost, and tiers need not be ordered. Few outcomes change
    little.

    Example:  headrace train outcomes.jsonl --out scorer.json

    Example:  headrace train feedback.jsonl --out scorer.json --tiers small,code,large
    """
    from headrace.cli.files.training import Weighting
    from headrace.cli.files.training import train as run

    with complaining():
        run(rows, out, tiers, artifact, Console(highlight=False), Weighting(half_life_days, most_per_tenant))


def check(
    jsonl: Annotated[
        str, typer.Option(metavar="FILE", help="JSON Lines with id, prompt and draft; - is standard input.")
    ],
    artifact: Artifact = None,
) -> None:
    """Check drafts of answers, without a mesh. A higher score means that a larger tier should answer.

    Optional fields of a row: "finished" (whether the model ended its answer itself), "logprobs" (of the
    tokens of the draft) and "samples" (other sampled answers of the same model, to compare with the draft).

    Example:  headrace check --jsonl drafts.jsonl
    """
    from headrace.cli.files.offline import print_checks

    with complaining():
        print_checks(jsonl, artifact)
