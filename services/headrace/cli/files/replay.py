"""`headrace replay`: compare a candidate with the logged policy, from the router's decision log."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from headrace.cli.files.rows import BadRow, read_rows
from headrace.routing import calibration
from headrace.routing.calibration import BadCalibration, are_thresholds
from headrace.routing.changes import replay as replaying
from headrace.routing.changes.estimating import Comparison, Interval, compare
from headrace.routing.changes.records import BadRecord, Logged, Rated, join, parse
from headrace.routing.changes.replay import Candidate, Replayed
from headrace.routing.scoring import scorer
from headrace.routing.scoring.score import Objective, fingerprint

# What is compared, whether more is better, and the results that are from 0 to 1.
_MEASURES: dict[str, tuple[Callable[[Logged, str], float | None], bool, bool]] = {
    "quality": (partial(replaying.quality, source="caller"), True, True),
    # A judge compares two answers, so its outcomes are not on the scale of the callers.
    "judged": (partial(replaying.quality, source="judge"), True, True),
    "cost": (replaying.cost, False, False),
    "errors": (replaying.failed, False, True),
    "seconds": (replaying.seconds, False, False),
}

_ADVICE = "Run the router with --explore, or with a higher share, or collect more requests and ratings"
_ADVICE_JUDGED = (
    "Run the router with this candidate as --shadow-scorer or --shadow-calibration, or for longer"
)


def read_log(paths: Sequence[str], last: int) -> list[Logged]:
    """Return the last requests of decision logs, oldest first, with their ratings.

    paths   of files; the rotated file beside each is read as well; - is standard input

    Raises BadRow.
    """
    requests: deque[Logged] = deque(maxlen=last)
    ratings: list[Rated] = []
    for path in paths:
        older = f"{path}.1"
        for part in ([older] if path != "-" and Path(older).exists() else []) + [path]:
            for number, row in enumerate(read_rows(part, []), start=1):
                try:
                    record = parse(row)
                except BadRecord as error:
                    raise BadRow(f"{part}, row {number}: {error}") from error
                if isinstance(record, Logged):
                    requests.append(record)
                else:
                    ratings.append(record)
    if not requests:
        raise BadRow(f"{', '.join(paths)}: no requests; a router writes them with --decision-log")
    return join([*requests, *ratings])


def candidate_of(
    artifact: Path | None,
    objective: Objective | None,
    calibrated: Path | None,
    share: str,
    thresholds: str,
    last: Logged,
) -> Candidate:
    """Return the candidate of these options; see `headrace replay`.

    last   the last request with a decision by the scorer in use

    Raises BadRow and BadArtifact.
    """
    tiers = [tier.name for tier in last.tiers]
    loaded = scorer.load(artifact, objective or "both") if artifact is not None or objective else None
    if sum(bool(one) for one in (calibrated, share, thresholds)) > 1:
        raise BadRow("give one of --calibration, --share and --thresholds")
    if loaded is None and not (calibrated or share or thresholds):
        raise BadRow("give one of --candidate, --objective, --calibration, --share and --thresholds")
    if calibrated is not None:
        try:
            made = calibration.load(calibrated)
        except BadCalibration as error:
            raise BadRow(str(error)) from error
        if made.tiers != tuple(tiers):
            raise BadRow(
                f"{calibrated} is for the tiers {', '.join(made.tiers)}, the log has {', '.join(tiers)}"
            )
        if made.scorer != (last.scorer if loaded is None else fingerprint(loaded)):
            other = "the log" if loaded is None else "the candidate"
            raise BadRow(
                f"{calibrated} was made with another scorer or --objective than {other}: calibrate again"
            )
        return Candidate(loaded, made.thresholds)
    if thresholds:
        marks = [0.0, *_numbers("--thresholds", thresholds)]
        if not are_thresholds(marks, len(tiers)):
            raise BadRow(f"{len(tiers)} tiers need {len(tiers) - 1} ascending --thresholds from 0 to 1")
        return Candidate(loaded, marks)
    shares = _numbers("--share", share) if share else None
    if shares is not None and not (
        len(shares) == len(tiers) - 1 and all(one >= 0 for one in shares) and sum(shares) <= 1 + 1e-9
    ):
        raise BadRow(
            f"--share needs {len(tiers) - 1} numbers from 0 to 1, one per tier after the first, which add up "
            "to at most 1"
        )
    return Candidate(loaded, None, shares)


def run(
    paths: Sequence[str],
    *,
    artifact: Path | None,
    objective: Objective | None,
    calibrated: Path | None,
    share: str,
    thresholds: str,
    last: int,
    as_json: bool,
    console: Console,
) -> None:
    """Print what the candidate would have achieved. Raises BadRow and BadArtifact."""
    shown = console.is_terminal and not as_json
    with console.status("reading") if shown else nullcontext():
        requests = read_log(paths, last)
    decided = [one for one in requests if one.choice]
    if not decided:
        raise BadRow(f"{', '.join(paths)}: no tier was chosen for any request")
    candidate = candidate_of(artifact, objective, calibrated, share, thresholds, replaying.latest(decided))

    def progress(every: Iterable[Logged]) -> Iterable[Logged]:
        return track(list(every), "scoring", console=console, transient=True, disable=not shown)

    try:
        replayed = replaying.replay(requests, candidate, progress)
    except ValueError as error:
        raise BadRow(str(error)) from error
    with console.status("estimating") if shown else nullcontext():
        compared = _compare(replayed)
    if as_json:
        print(json.dumps(_summary(replayed, compared), allow_nan=False))
        return
    _print_requests(replayed, candidate, console)
    for table in _tables(compared):
        console.print(table)
    for name, comparison in compared.items():
        console.print(f"{name}: {_verdict(name, comparison)}", soft_wrap=True, highlight=False)
    if "quality" not in compared:
        console.print(
            "quality: the log cannot tell: no answer has a rating. Report outcomes with `headrace feedback`",
            soft_wrap=True,
            highlight=False,
        )


def _compare(replayed: Replayed) -> dict[str, Comparison]:
    """Return the comparison of each measure of which a request has a result."""
    compared = {}
    for name, (result, _, bounded) in _MEASURES.items():
        sample = replaying.sample(replayed, result)
        try:
            compared[name] = compare(sample, bounded=bounded)
        except ValueError:
            continue  # no request has this result
    return compared


def _print_requests(replayed: Replayed, candidate: Candidate, console: Console) -> None:
    """Print which requests are compared, and the share of each tier."""
    first, last = (
        time.strftime("%Y-%m-%d %H:%M", time.gmtime(replayed.requests[place].time)) for place in (0, -1)
    )
    count = len(replayed.requests)
    by_success = candidate.scorer is not None and candidate.scorer.model.tiers is not None
    if candidate.thresholds is not None or candidate.shares is not None:
        by_success = False
    by_score = count - replayed.weighed if by_success else 0
    console.print(f"{count} requests, {first} to {last} UTC", highlight=False)
    if replayed.unscored:
        share = replayed.unscored / (count + replayed.unscored)
        console.print(
            f"{replayed.unscored} more ({share:.0%}) are left out, because the candidate cannot score them: "
            "they have no text, and other features or earlier turns. The figures are not about such requests",
            style="yellow",
            soft_wrap=True,
        )
    if replayed.weighed:
        console.print(f"{replayed.weighed} are chosen by the candidate's P(good) and the expected cost")
    if by_score:
        console.print(
            f"{by_score} are chosen by the candidate's score although it has P(good): they were logged by a "
            "router that did not choose by success, so their expected costs are not known. A router with "
            "this scorer chooses by success unless --share, --thresholds or --calibration is set",
            style="yellow",
            soft_wrap=True,
            highlight=False,
        )
    if replayed.left_out:
        console.print(
            f"{replayed.left_out} left out: no tier was chosen, the tiers were others, or another scorer "
            "than the last one has scored them",
            style="yellow",
            soft_wrap=True,
        )
    table = _columns("share of", "logged", "candidate")
    for place, tier in enumerate(replayed.tiers):
        table.add_row(tier, *(f"{share:.1%}" for share in _shares(replayed, place)))
    console.print(table)


def _shares(replayed: Replayed, place: int) -> tuple[float, float]:
    """Return the shares of requests that the logged policy and the candidate sent to a tier."""
    tier, count = replayed.tiers[place], len(replayed.requests)
    logged = sum(one.choice == tier for one in replayed.requests)
    return logged / count, list(replayed.chosen).count(place) / count


def _tables(compared: dict[str, Comparison]) -> list[Table]:
    """Return the estimates, and the simpler estimates that they can be checked with, as tables.

    They fit 80 columns, and values are not cut off in a narrower terminal.
    """
    table = _columns("", "known", "logged", "candidate", "difference, 95 % interval")
    table.title = "mean per request; cost of 1,000 requests"
    checks = _columns("", "weights only (IPS)", "normalised (SNIPS)", "effective rows")
    checks.title = "simpler estimates of the candidate, which should be near"
    for name, one in compared.items():
        scale = _scale(name)
        table.add_row(name, f"{one.known}", _number(scale * one.logged.value), *_estimates(name, one))
        if one.differ and not one.problem:
            others = (_number(scale * one.ips.value), _number(scale * one.snips.value))
            checks.add_row(name, *others, f"{one.effective_rows:.0f}")
    return [table, checks] if checks.rows else [table]


def _columns(first: str, *headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _estimates(name: str, one: Comparison) -> tuple[str, str]:
    """Return the cells of the candidate; without figures that the log does not support."""
    if one.problem:
        return ("cannot tell", "")
    scale = _scale(name)
    low, high = _number(scale * one.dr.low), _number(scale * one.dr.high)
    return f"{_number(scale * one.dr.value)} [{low}, {high}]", _shown(name, one.difference)


def _scale(name: str) -> float:
    """Return the number of requests that a figure is shown for: the cost of one is small."""
    return 1000.0 if name == "cost" else 1.0


def _verdict(name: str, one: Comparison) -> str:
    """Return in one sentence what the log shows about a measure."""
    if one.problem:
        advice = _ADVICE_JUDGED if name == "judged" else _ADVICE
        return f"the log cannot tell: {one.problem}. {advice}"
    if not one.differ:
        return "the candidate decides all requests as logged, apart from those that chance decided"
    more_is_better = _MEASURES[name][1]
    if one.difference.low > 0 or one.difference.high < 0:
        better = (one.difference.low > 0) == more_is_better
        return f"the candidate is {'better' if better else 'worse'}, by {_shown(name, one.difference)}"
    return f"no difference is seen; it is within {_shown(name, one.difference, value=False)}"


def _shown(name: str, interval: Interval, *, value: bool = True) -> str:
    scale = _scale(name)
    both = f"[{_signed(scale * interval.low)}, {_signed(scale * interval.high)}]"
    return f"{_signed(scale * interval.value)} {both}" if value else both


def _number(value: float) -> str:
    return f"{value:.3g}"


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def _summary(replayed: Replayed, compared: dict[str, Comparison]) -> dict[str, Any]:
    """Return the result as JSON; numbers that are not finite are null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(one) for key, one in value.items()}
        return None if isinstance(value, float) and not abs(value) < float("inf") else value

    return {
        "requests": len(replayed.requests),
        "unscored": replayed.unscored,
        "left_out": replayed.left_out,
        "chosen_by_success": replayed.weighed,
        "tiers": {
            tier: dict(zip(("logged", "candidate"), _shares(replayed, place), strict=True))
            for place, tier in enumerate(replayed.tiers)
        },
        "measures": {
            name: {**finite(asdict(one)), "verdict": _verdict(name, one)} for name, one in compared.items()
        },
    }


def _numbers(option: str, listed: str) -> list[float]:
    try:
        return [float(part) for part in listed.split(",")]
    except ValueError:
        raise BadRow(f"{option} {listed!r} is not a list of numbers separated by commas") from None
