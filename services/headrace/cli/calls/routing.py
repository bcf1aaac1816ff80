"""`headrace explain`, `tiers` and `feedback`: call the router, and show its responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headrace.client import chat

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from google.protobuf.message import Message
    from rich.console import RenderableType

    from headrace.cli.calls.connection import Connection
    from headrace.v1 import routing_service_pb2 as pb


async def call_explain(connection: Connection, prompt: str) -> pb.ExplainResponse:
    """Ask a router for the tier of *prompt*. Raises a HeadraceError."""
    async with connection.open() as client:
        return await client.explain(chat(prompt))


async def call_list_tiers(connection: Connection) -> pb.ListTiersResponse:
    """Ask the server for its tiers. Raises a HeadraceError."""
    async with connection.open() as client:
        return await client.list_tiers()


async def send_feedback(
    connection: Connection,
    answer_id: str,
    request_id: str,
    *,
    ok: bool | None,
    quality: float | None,
    tier: str,
    tenant: str,
) -> pb.FeedbackResponse:
    """Send the quality of an answer to a router. Raises a HeadraceError."""
    async with connection.open() as client:
        return await client.feedback(
            request_id, answer_id=answer_id, ok=ok, quality=quality, tier=tier, tenant=tenant
        )


def feedback_result(response: pb.FeedbackResponse) -> str:
    """Describe how the router used feedback."""
    kept = "kept" if response.kept else "counted, not kept: the router was started without --feedback FILE"
    return f"tier {response.tier}: {kept}"


def as_dict(response: Message) -> dict[str, Any]:
    """Return all fields by their names in the contract, including those that are zero."""
    return MessageToDict(
        response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def explanation(response: pb.ExplainResponse) -> Iterator[RenderableType]:
    """Yield the parts of an explanation: the decision, the features of the score, and the candidates."""
    yield Text.assemble(
        ("score ", "dim"),
        (f"{response.score:.3f}", "bold"),
        ("  tier ", "dim"),
        (response.tier, "bold green"),
    )
    yield Text(response.why)
    yield features_table(response)
    yield candidates_table(response.candidates)


def features_table(response: pb.ExplainResponse) -> Table:
    """Return the features by weight, and the bias. The log-odds add up to those of the score."""
    table = Table("feature", title="features of the score", title_justify="left")
    table.add_column("value", justify="right")
    table.add_column("log-odds", justify="right")
    table.add_column("")
    features = sorted(response.features, key=lambda feature: -abs(feature.log_odds))
    for feature in features:
        table.add_row(
            Text(feature.name), f"{feature.value:.2f}", f"{feature.log_odds:+.2f}", _bar(feature.log_odds)
        )
    table.add_row("[dim](bias)[/]", "", f"{response.bias:+.2f}", _bar(response.bias), end_section=True)
    total = response.bias + sum(feature.log_odds for feature in response.features)
    table.add_row("[bold]score[/]", f"[bold]{response.score:.3f}[/]", f"{total:+.2f}", "")
    return table


def _bar(log_odds: float) -> Text:
    """Draw log-odds as a bar: to the right for a larger tier, to the left for a smaller one."""
    length = min(8, round(abs(log_odds) * 2))
    left, right = ("█" * length, "") if log_odds < 0 else ("", "█" * length)
    return Text.assemble((f"{left:>8}", "green"), ("│", "dim"), (f"{right:<8}", "yellow"))


def candidates_table(candidates: Sequence[pb.Candidate]) -> Table:
    """Return the tiers that were considered, smallest first."""
    table = Table("tier", "from score", "eligible", "why", title="candidates", title_justify="left")
    for candidate in candidates:
        table.add_row(
            Text(candidate.tier.name),
            f"{candidate.threshold:.2f}",
            "[green]yes[/]" if candidate.eligible else "[red]no[/]",
            Text(candidate.reason),
        )
    return table


def tiers_table(tiers: Sequence[pb.Tier]) -> Table:
    """Return the tiers with model, health, limits and load."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("tier", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("health", overflow="fold")
    for heading in ("context", "workers", "running", "queued", "tokens/s"):
        table.add_column(heading, justify="right", overflow="fold")
    for tier in tiers:
        health = (
            Text("healthy", "green") if tier.healthy else Text(tier.unhealthy_reason or "unhealthy", "red")
        )
        table.add_row(
            Text(tier.name),
            Text(tier.model or "?"),
            health,
            str(tier.limits.context_length or "-"),  # of a service outside of the mesh it may be unknown
            str(tier.load.workers),
            f"{tier.load.running}/{tier.limits.max_running}",
            f"{tier.load.queued}/{tier.limits.queue_limit}",
            f"{tier.load.tokens_per_second:.1f}",
        )
    return table
