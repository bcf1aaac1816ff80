"""Score prompts and check drafts without a mesh: `explain --jsonl` and `check`."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING

from headrace.cli.files.rows import BadRow, read_rows
from headrace.routing.calibration import are_thresholds
from headrace.routing.drafts import check as draft_check
from headrace.routing.policy import decide
from headrace.routing.request import Hints
from headrace.routing.scoring import scorer
from headrace.routing.scoring.score import UNSCORED, Objective
from headrace.routing.tier_view import TierView, even_thresholds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from headrace.routing.scoring.score import Score

_FEATURES = 3  # in a reason


def print_scores(
    path: str, artifact: Path | None, tiers: str, from_score: str, objective: Objective = "both"
) -> None:
    """Print score, tier, reason and latency of the decision for each prompt or conversation of *path*.

    tiers        names, smallest first, separated by commas
    from_score   the lowest score of each tier after the first, separated by commas; evenly spaced if empty

    Raises BadRow and BadArtifact.
    """
    names = [name.strip() for name in tiers.split(",") if name.strip()]
    if not names:
        raise BadRow("--tiers has no tier")
    views = [TierView(name, lowest) for name, lowest in zip(names, _lowest(names, from_score), strict=True)]
    loaded = scorer.load(artifact, objective)
    loaded.score("The first call is slower.")
    for row in read_rows(path, [], turns=True):
        began = time.perf_counter()
        try:
            score, problem = loaded.score_turns(row["turns"]), ""
        except Exception as error:  # like the router, which then routes without a score
            score, problem = UNSCORED, f"the prompt could not be scored ({type(error).__name__})"
        decision = decide(score.value, Hints(), views, continues=score.continues)
        took = time.perf_counter() - began
        _print_row(
            id=row["id"],
            score=round(score.value, 6),
            tier=decision.tier,
            reason=f"{decision.why}; {problem or _main_features(score)}",
            latency_ms=round(1000 * took, 4),
        )


def print_checks(path: str, artifact: Path | None) -> None:
    """Print a score from 0 to 1 for each row of *path*: the higher, the more its draft needs a larger tier.

    If the check of a row fails, its score is null, and the reason is printed.

    Raises BadRow and BadArtifact.
    """
    checker = draft_check.load(artifact)
    for row in read_rows(path, ["prompt", "draft"]):
        finished, logprobs = row.get("finished", True), row.get("logprobs")
        if not isinstance(finished, bool):
            raise BadRow(f"{path}, row {row['id']!r}: field 'finished' must be true or false")
        if logprobs is not None:
            if not (isinstance(logprobs, list) and all(_is_number(value) for value in logprobs)):
                raise BadRow(f"{path}, row {row['id']!r}: field 'logprobs' must be a list of numbers")
            logprobs = [float(value) for value in logprobs]
        samples = row.get("samples", [])
        if not (isinstance(samples, list) and all(isinstance(sample, str) for sample in samples)):
            raise BadRow(f"{path}, row {row['id']!r}: field 'samples' must be a list of strings")
        try:
            verdict = checker.check(
                row["prompt"], row["draft"], finished=finished, logprobs=logprobs, samples=samples
            )
        except Exception as error:  # like the router, which then releases the draft
            reason = f"the draft could not be checked ({type(error).__name__})"
            _print_row(id=row["id"], score=None, good=None, reasons=[reason])
            continue
        _print_row(
            id=row["id"],
            score=round(1 - verdict.good, 6),
            good=round(verdict.good, 6),
            reasons=list(verdict.reasons),
        )


def _lowest(names: Sequence[str], from_score: str) -> list[float]:
    if not from_score.strip():
        return even_thresholds(len(names))
    try:
        lowest = [0.0, *(float(part) for part in from_score.split(","))]
    except ValueError:
        raise BadRow(f"--thresholds {from_score!r} is not a list of numbers separated by commas") from None
    if not are_thresholds(lowest, len(names)):
        raise BadRow(f"{len(names)} tiers need {len(names) - 1} ascending --thresholds from 0 to 1")
    return lowest


def _is_number(value: object) -> bool:
    """Return whether a value is a number that fits a float."""
    try:
        return isinstance(value, int | float) and not math.isnan(float(value))
    except OverflowError:
        return False


def _print_row(**row: object) -> None:
    # ASCII: an id may contain lone surrogates, and the terminal may not support Unicode.
    print(json.dumps(row))


def _main_features(score: Score) -> str:
    """Return the kind of prompt, and the features with most influence on the score, as text."""
    kinds = [share for share in score.features if share.name.startswith("kind:")]
    others = sorted(
        (share for share in score.features if not share.name.startswith("kind:")),
        key=lambda share: -abs(share.log_odds),
    )
    kind = max(kinds, key=lambda share: share.value, default=None)
    # What the conversation adds comes first: it is not a feature of the last turn.
    others.sort(key=lambda share: not share.name.startswith("turn:"))
    parts = [f"{share.name} {share.log_odds:+.2f}" for share in others[:_FEATURES]]
    if kind is not None:
        parts.insert(0, f"reads as {kind.name.removeprefix('kind:')} ({kind.value:.0%})")
    return ", ".join(parts)
