"""The command that compares a candidate with the logged decisions of a router. It needs no mesh."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cli.complaints import complaining
from headrace.routing.scoring.score import Objective


def replay(
    logs: Annotated[
        list[str],
        typer.Argument(
            metavar="LOG",
            help="Files that routers wrote with --decision-log; the rotated file beside each is read as "
            "well. - is standard input.",
        ),
    ],
    candidate: Annotated[
        Path | None, typer.Option(help="Scorer to evaluate. Default: the scores in the log.")
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            metavar="AIM",
            help="What the candidate aims at: correctness, preference or both (the default). Without "
            "--candidate, the shipped scorer with this aim is evaluated. A refitted scorer ignores it.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Thresholds of the candidate, that `headrace calibrate` wrote.")
    ] = None,
    share: Annotated[
        str,
        typer.Option(
            help="Instead, the share of calls of each tier after the first: 0.3 or 0.2,0.1. Default: the "
            "shares in the log."
        ),
    ] = "",
    thresholds: Annotated[
        str, typer.Option(help="Instead, the lowest score of each tier after the first: 0.5 or 0.4,0.8.")
    ] = "",
    last: Annotated[int, typer.Option(metavar="N", min=1, help="Read the last N requests.")] = 100_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Estimate quality, cost, errors and time of another scorer or other thresholds from a decision log.

    The router must explore (--explore 0.01): otherwise, no result of another tier is known. If it also
    answers some requests twice, by --shadow-scorer with a --judge, the judge's verdicts are compared as well.
    The output says so if the log cannot tell.

    Example:  headrace replay decisions.jsonl --candidate scorer.json

    Example:  headrace replay decisions.jsonl --share 0.2
    """
    from headrace.cli.files.replay import run

    with complaining():
        run(
            logs,
            artifact=candidate,
            objective=objective,
            calibrated=calibration,
            share=share,
            thresholds=thresholds,
            last=last,
            as_json=as_json,
            console=Console(),
        )
