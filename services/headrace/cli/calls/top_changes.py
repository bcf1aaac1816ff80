"""The part of `headrace top` about changes of the routing: canary, shadow answers and decision log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headrace.cli.calls.amounts import money

if TYPE_CHECKING:
    from rich.console import RenderableType

    from headrace.v1 import routing_changes_pb2 as pb


def changes_parts(changes: pb.RoutingChanges) -> list[RenderableType]:
    """Return a table and lines about what is in use of canary, shadow answers and decision log."""
    parts: list[RenderableType] = []
    if changes.HasField("canary"):
        parts += [canary_table(changes), Text(canary_line(changes.canary), _style(changes.canary))]
    if changes.HasField("shadow"):
        parts.append(Text(shadow_line(changes.shadow)))
    if changes.HasField("decision_log"):
        log = changes.decision_log
        style = "red" if log.dropped else ""
        parts.append(Text(f"decision log: {log.rows:,} rows, {log.dropped:,} dropped", style))
    return parts


def canary_table(changes: pb.RoutingChanges) -> Table:
    """Return what the requests of both scorers resulted in."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("arm", "scorer"):
        table.add_column(heading, no_wrap=True)
    for heading in ("share", "requests", "failed", "rated", "quality", "cost per request"):
        table.add_column(heading, justify="right", overflow="fold")
    canary = changes.canary
    for name, scorer, share, arm in (
        ("control", changes.scorer, 1 - canary.share, canary.control),
        ("canary", canary.scorer, canary.share, canary.candidate),
    ):
        table.add_row(
            name,
            Text(scorer),
            f"{share:.0%}",
            f"{arm.requests:,}",
            f"{arm.failed / arm.requests:.1%}" if arm.requests else "-",
            f"{arm.rated:,}",
            f"{arm.quality:.2f}" if arm.HasField("quality") else "-",
            money(arm.cost) if arm.HasField("cost") else "-",
        )
    return table


def canary_line(canary: pb.CanaryState) -> str:
    """Return the state of the comparison in one line."""
    if canary.rolled_back:
        return f"canary rolled back: it was worse in {canary.rolled_back}; replace its file to try again"
    measures = [
        f"{measure.name} p {measure.p_value:.2g} (rolled back at {measure.limit:g})"
        if measure.outcomes >= measure.fewest
        else f"{measure.name} {measure.outcomes} of {measure.fewest} outcomes"
        for measure in canary.measures
        if measure.outcomes
    ]
    return f"canary: {'; '.join(measures) or 'no outcomes so far'}"


def shadow_line(shadow: pb.ShadowFigures) -> str:
    """Return the figures of shadow answers in one line."""
    line = f"shadow: {shadow.requests:,} answers, {shadow.skipped:,} skipped, {shadow.tokens:,} tokens"
    if shadow.HasField("cost"):
        line += f", cost {money(shadow.cost)}"
    judged = shadow.better + shadow.worse + shadow.ties
    if judged:
        line += f"; {judged:,} judged: {shadow.better:,} better, {shadow.worse:,} worse, {shadow.ties:,} tie"
    return line


def _style(canary: pb.CanaryState) -> str:
    return "red" if canary.rolled_back else ""
