"""`headrace train`: refit the scorer to outcomes, and fit each tier's chance of success."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import track
from rich.table import Table

from headrace.cli.files.outcomes import inputs_of, of_both, of_tiers, read_outcomes
from headrace.cli.files.rows import BadRow
from headrace.routing.learning import fitting, success
from headrace.routing.scoring import scorer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from rich.console import Console

    from headrace.cli.files.outcomes import Asked
    from headrace.routing.learning.fitting import Refit
    from headrace.routing.learning.success import Fitted


@dataclass(frozen=True, slots=True)
class Weighting:
    """How much outcomes count.

    half_life_days    age, before the newest, at which an outcome counts half
    most_per_tenant   share of a tier's outcomes that one tenant's may count for
    """

    half_life_days: float = 30.0
    most_per_tenant: float = 0.2


def train(
    path: str,
    out: Path,
    tiers: str,
    artifact: Path | None,
    console: Console,
    weighting: Weighting = Weighting(),
) -> None:
    """Refit the scorer to the outcomes in *path*, print figures, and write it to *out*.

    tiers   names, separated by commas, smallest first

    Raises BadRow, also if the rows are not sufficient or *out* cannot be written, and BadArtifact.
    """
    names = [name.strip() for name in tiers.split(",")]
    if len(names) < 2 or not all(names) or len(set(names)) < len(names):
        raise BadRow(f"--tiers {tiers!r} must name two or more different tiers, the smallest first")
    scores = scorer.load(artifact)
    every = read_outcomes(path, names)
    shown = track(every, "scoring", console=console, transient=True, disable=not console.is_terminal)
    asked, inputs = inputs_of(shown, scores)
    if len(asked) < len(every):
        console.print(f"{len(every) - len(asked)} ignored: their last turn continues a conversation")
    model, problems = scores.model, []
    try:
        with console.status("fitting the score"):
            refit = _refit(model, asked, inputs, names, weighting, console)
        model = refit.model
    except ValueError as error:
        problems.append(f"the score is not refitted: {error}")
    try:
        with console.status("fitting the chances of success"):
            fitted = _fit_tiers(model, asked, inputs, names, weighting, console)
        model = replace(model, tiers=fitted.heads)
    except ValueError as error:
        problems.append(f"no chance of success is fitted: {error}")
        model = replace(model, tiers=None)
    if len(problems) == 2:
        raise BadRow(f"{path}: {'; '.join(problems)}")
    for problem in problems:
        console.print(problem, markup=False, soft_wrap=True)
    try:
        scorer.save(model, out)
    except OSError as error:
        raise BadRow(f"{out} cannot be written: {error.strerror or error}") from error
    console.print(f"written: {out}", markup=False, soft_wrap=True)


def _refit(
    model: scorer.Model,
    asked: Sequence[Asked],
    inputs: NDArray[np.float64],
    names: Sequence[str],
    weighting: Weighting,
    console: Console,
) -> Refit:
    """Refit the gain of the last tier over the first, and print how well it routes. Raises ValueError."""
    pairs = of_both(asked, names[0], names[-1], most_per_tenant=weighting.most_per_tenant)
    both = pairs.places
    if not len(both):
        raise ValueError(f"no prompt has both '{names[0]}_ok' and '{names[-1]}_ok'")
    features = inputs[both, : model.gate.shape[1]]
    fitted = fitting.refit(model, features, pairs.weak, pairs.strong, weights=pairs.weight)
    if len(both) < len(asked):
        console.print(
            f"{len(asked) - len(both)} prompts ignored for the score: they lack the outcome of the first "
            "or the last tier",
            soft_wrap=True,
        )
    console.print(f"{len(both)} prompts, cross-validated (chance is APGR 0.500, CPT50 50, CPT80 80):")
    for name, figures in (("before", fitted.before), ("after", fitted.after)):
        console.print(
            f"  {name:6}  APGR {figures.apgr:.3f}  CPT50 {figures.cpt50:.1f}  CPT80 {figures.cpt80:.1f}"
        )
    if fitted.after.apgr <= fitted.before.apgr:
        console.print(
            "On rows outside of its training set, it is not better than before. Consider not using it."
        )
    return fitted


def _fit_tiers(
    model: scorer.Model,
    asked: Sequence[Asked],
    inputs: NDArray[np.float64],
    names: Sequence[str],
    weighting: Weighting,
    console: Console,
) -> Fitted:
    """Fit each tier's chance of success, and print how good the estimates are. Raises ValueError."""
    outcomes, reporters = of_tiers(
        asked,
        inputs,
        names,
        half_life_days=weighting.half_life_days,
        most_per_tenant=weighting.most_per_tenant,
    )
    fitted = success.fit(names, outcomes, kinds=len(model.kinds))
    _print_reporters(reporters, console)
    console.print(_table(fitted))
    worse = [
        name
        for name, measured in zip(names, fitted.measured, strict=True)
        if measured.brier > measured.base + 0.005
    ]
    if worse:
        console.print(
            f"For {', '.join(worse)}, the estimates are worse than the share of good answers: more outcomes "
            "are needed.",
            markup=False,
            soft_wrap=True,
        )
    return fitted


def _print_reporters(reporters: Mapping[str, tuple[float, float]], console: Console) -> None:
    for name, (before, after) in sorted(reporters.items()):
        if after < 0.99 * before:
            console.print(
                f"outcomes of {name or 'rows without a tenant'}: {before:.0f} count as {after:.0f} "
                "(--most-per-tenant)",
                markup=False,
                soft_wrap=True,
            )


def _table(fitted: Fitted) -> Table:
    """Return, per tier, the estimates for outcomes that they were not fitted to beside those outcomes."""
    table = Table("tier", title="P(good), cross-validated", title_justify="left")
    for heading in ("outcomes", "good", "Brier", "of base rate", "calibration error"):
        table.add_column(heading, justify="right")
    table.add_column("estimated : actual, by fifths")
    for tier, measured in zip(fitted.heads.tiers, fitted.measured, strict=True):
        table.add_row(
            tier,
            str(measured.rows),
            f"{measured.mean:.0%}",
            f"{measured.brier:.3f}",
            f"{measured.base:.3f}",
            f"{measured.error:.3f}",
            "  ".join(f"{part.expected:.2f}:{part.actual:.2f}" for part in measured.bins),
        )
    return table
