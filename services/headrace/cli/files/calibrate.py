"""`headrace calibrate`: derive the thresholds of a router from a file of the user's traffic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from headrace.routing import calibration
from headrace.routing.calibration import BadCalibration, Point, ScoredPrompt
from headrace.routing.scoring import scorer
from headrace.routing.scoring.conversation import Turn, turns_of_row
from headrace.routing.scoring.score import Objective, Scorer, fingerprint

_LINES = 21  # of the table; the trade-off has more points


def read_traffic(path: Path, scores: Scorer, tiers: Sequence[str], console: Console) -> list[ScoredPrompt]:
    """Score the prompts of *path*: JSON Lines with `prompt` or `messages`, and optionally `NAME_ok` per tier.

    Rows with the same prompt are merged, because the router writes one row per feedback. Raises
    BadCalibration.
    """
    try:
        # Not `splitlines`: a prompt may contain characters that Python treats as line ends, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise BadCalibration(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadCalibration(f"{path} is not UTF-8 text: {error.reason}") from error
    merged: dict[tuple[int, Sequence[Turn]], dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadCalibration(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise BadCalibration(f"{path}, line {number}: not a JSON object")
        try:
            row["turns"] = tuple(turns_of_row(row))
        except ValueError as error:
            raise BadCalibration(f"{path}, line {number}: {error}") from None
        if row.get("prompt") == "":
            raise BadCalibration(f"{path}, line {number}: field 'prompt' is empty")
        # The same prompt without labels counts each time; with labels, its rows are merged.
        key = (0 if any(f"{tier}_ok" in row for tier in tiers) else number, row["turns"])
        merged.setdefault(key, {}).update(row)
    if not merged:
        raise BadCalibration(f"{path} has no rows")
    labelled = [row for row in merged.values() if all(f"{tier}_ok" in row for tier in tiers)]
    if labelled and len(labelled) < len(merged):
        console.print(
            f"{len(merged) - len(labelled)} of {len(merged)} prompts lack a tier's label and are ignored",
            style="yellow",
        )
    rows = labelled or list(merged.values())
    return [
        ScoredPrompt(
            scores.score_turns(row["turns"]).value, calibration.qualities(row, tiers) if labelled else ()
        )
        for row in track(rows, "scoring", console=console, transient=True, disable=not console.is_terminal)
    ]


def curve_table(tiers: Sequence[str], points: Sequence[Point], chosen: Point) -> Table:
    """Return the trade-off as a table, cheapest first, with the chosen point highlighted."""
    table = Table(title="trade-off", title_justify="left")
    for tier in tiers[1:]:
        table.add_column(f"{tier} from", justify="right")
    for tier in tiers:
        table.add_column(f"to {tier}", justify="right")
    table.add_column("cost", justify="right")
    labelled = chosen.quality is not None
    if labelled:
        table.add_column("quality", justify="right")
        table.add_column("of the gap", justify="right")
    table.add_column("")
    step = max(len(points) / (_LINES - 1), 1)
    places = sorted({min(round(line * step), len(points) - 1) for line in range(_LINES)})
    shown = {points[place].thresholds: points[place] for place in places}
    shown[chosen.thresholds] = chosen
    for point in sorted(shown.values(), key=lambda point: point.cost):
        cells = [f"{mark:.3f}" for mark in point.thresholds[1:]]
        cells += [f"{share:.0%}" for share in point.shares]
        cells.append(f"{point.cost:.0%}")
        if labelled:
            cells.append(f"{point.quality:.3f}")
            cells.append("" if point.recovered is None else f"{point.recovered:.0%}")
        is_chosen = point is chosen
        table.add_row(*cells, "<- chosen" if is_chosen else "", style="bold green" if is_chosen else "")
    return table


def draw(tiers: Sequence[str], points: Sequence[Point], chosen: Point, path: Path) -> None:
    """Write the trade-off as a picture. Raises BadCalibration if it cannot be drawn or written."""
    try:
        import matplotlib
    except ImportError:
        raise BadCalibration("--png needs matplotlib: pip install 'headrace[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    labelled = chosen.quality is not None
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), dpi=120)
    costs = [100 * point.cost for point in points]
    if labelled:
        heights, height, label = [p.quality or 0.0 for p in points], chosen.quality or 0.0, "mean quality"
        axes.plot([costs[0], costs[-1]], [heights[0], heights[-1]], ":", color="grey", label="at random")
    else:
        heights, height = [p.thresholds[-1] for p in points], chosen.thresholds[-1]
        label = f"threshold of {tiers[-1]}"
    axes.plot(costs, heights, label="by score")
    axes.plot([100 * chosen.cost], [height], "o", label="chosen")
    axes.set_xlabel(f"cost, % of always {tiers[-1]}")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # a ValueError lists the supported formats
        raise BadCalibration(f"{path} cannot be written: {_reason(error)}") from error
    finally:
        pyplot.close(figure)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def calibrate(
    traffic: Path,
    *,
    tiers: Sequence[str],
    costs: Sequence[float],
    shares: Sequence[float] | None,
    quality: float | None,
    out: Path,
    png: Path | None,
    artifact: Path | None = None,
    objective: Objective = "both",
    console: Console,
) -> None:
    """Choose thresholds by *shares* or *quality*, print the trade-off, and write the file for the router.

    Raises BadCalibration and BadArtifact.
    """
    scores = scorer.load(artifact, objective)
    rows = read_traffic(traffic, scores, tiers, console)
    points = calibration.curve(rows, costs)
    if quality is not None:
        chosen = calibration.for_quality(points, quality)
    else:
        chosen = calibration.for_shares(rows, costs, shares or [])
    console.print(curve_table(tiers, points, chosen))
    if len(rows) < 100:
        console.print(
            f"only {len(rows)} rows: shares will differ on other traffic", style="yellow", soft_wrap=True
        )
    try:
        calibration.save(calibration.calibration(tiers, chosen, rows, scorer=fingerprint(scores)), out)
    except OSError as error:
        raise BadCalibration(f"{out} cannot be written: {_reason(error)}") from error
    console.print(
        f"{out}: for --calibration of a router, which reloads the file when it changes", soft_wrap=True
    )
    if png is not None:
        draw(tiers, points, chosen, png)
        console.print(f"{png}: the trade-off as a picture", soft_wrap=True)
