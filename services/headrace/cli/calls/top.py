"""`headrace top`: the load of a mesh, what its requests experience, and its cost since the router started."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headrace import errors
from headrace.cli.answers import printable
from headrace.cli.calls.amounts import money
from headrace.cli.calls.top_changes import changes_parts
from headrace.v1 import generation_pb2 as generation
from headrace.v1 import routing_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, RenderableType

    from headrace.cli.calls.connection import Connection
    from headrace.client import Client
    from headrace.v1.admin_service_pb2 import TenantUse

WINDOW_SECONDS = 60.0  # of percentiles and batch fill
MAX_TENANTS = 10  # that are shown


async def top(connection: Connection, console: Console, *, interval: float, once: bool) -> None:
    """Show the mesh behind a router every *interval* seconds until cancelled.

    Keeps polling if the router becomes unavailable. Raises a HeadraceError if the first call fails.
    """
    async with connection.open() as client:
        first = await _poll(client)
        if once:
            console.print(screen(first))
            return
        recent = deque([first])
        with Live(screen(first), console=console, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(interval)
                try:
                    now = await _poll(client)
                except (errors.Unavailable, errors.DeadlineExceeded) as error:
                    live.update(Text(f"{error.message}; polling until it is back", "red"), refresh=True)
                    continue
                while len(recent) > 1 and now.at - recent[1].at > WINDOW_SECONDS:
                    recent.popleft()
                live.update(screen(now, recent[-1], recent[0]), refresh=True)
                recent.append(now)


@dataclass(frozen=True)
class Snapshot:
    """What a router reported at a time.

    tenants   what tenants used; None if the caller may not see it, or the server is no router
    """

    at: float
    listed: pb.ListTiersResponse
    tenants: Sequence[TenantUse] | None = None


async def _poll(client: Client) -> Snapshot:
    listed, tenants = await client.list_tiers(), None
    with suppress(errors.CredentialsRequired, errors.Forbidden, errors.Unimplemented):
        state = await client.inspect()
        if state.HasField("router"):
            tenants = state.router.tenants
    return Snapshot(time.monotonic(), listed, tenants)


def screen(now: Snapshot, before: Snapshot | None = None, oldest: Snapshot | None = None) -> RenderableType:
    """Return load, figures, bill, tenants, and changes of the routing.

    Rates are since *before*; percentiles and fill are since *oldest*, by default the start of the router.
    """
    listed = now.listed
    earlier, elapsed = (before.listed, now.at - before.at) if before is not None else (None, 0.0)
    parts: list[RenderableType] = [
        load_table(listed.tiers),
        figures_table(listed.tiers, oldest.listed.tiers if oldest is not None else ()),
    ]
    if listed.HasField("bill"):
        parts.append(bill_table(listed, earlier, elapsed))
    if now.tenants:
        parts.append(tenants_table(now.tenants, before.tenants or () if before is not None else (), elapsed))
    elif now.tenants is None:
        parts.append(Text("no tenants: they are shown to callers with the scope admin", "dim"))
    parts += changes_parts(listed.changes)
    if listed.HasField("bill"):
        parts.append(savings(listed))
    else:
        parts.append(Text("no bill: it is shown to callers of any tenant and to administrators", "dim"))
    return Group(*parts)


def load_table(tiers: Sequence[pb.Tier]) -> Table:
    """Return the load of each tier."""
    table = _table("model", "health", right=("running", "queued", "tokens/s"))
    for tier in tiers:
        table.add_row(
            Text(tier.name),
            Text(tier.model or "?"),
            Text("healthy", "green") if tier.healthy else Text(tier.unhealthy_reason or "unhealthy", "red"),
            str(tier.load.running),
            str(tier.load.queued),
            f"{tier.load.tokens_per_second:.1f}",
        )
    return table


def bill_table(now: pb.ListTiersResponse, before: pb.ListTiersResponse | None, elapsed: float) -> Table:
    """Return the answers, tokens and cost of each tier since the router started."""
    charges = {charge.tier: charge for charge in now.bill.charges}
    earlier = {charge.tier: charge.answers for charge in before.bill.charges} if before is not None else {}
    answers = sum(charge.answers for charge in charges.values())
    figures = ("answers", "per s", "share", "prompts", "cached", "tokens", "wasted", "cost")
    table = _table(right=figures)
    for tier in now.tiers:
        charge = charges.get(tier.name, generation.Charge())
        rate = max(charge.answers - earlier.get(tier.name, 0), 0) / elapsed if elapsed > 0 else None
        table.add_row(
            Text(tier.name),
            f"{charge.answers:,}",
            "-" if rate is None else f"{rate:.1f}",
            f"{charge.answers / answers:.0%}" if answers else "-",
            f"{charge.prompt_tokens:,}",
            f"{charge.cached_tokens / charge.prompt_tokens:.0%}" if charge.prompt_tokens else "-",
            f"{charge.completion_tokens:,}",
            f"{charge.wasted_tokens:,}",
            money(charge.cost) if charge.HasField("cost") else "-",
        )
    return table


def figures_table(tiers: Sequence[pb.Tier], before: Sequence[pb.Tier]) -> Table:
    """Return what requests experienced since *before*, or since the start: times in milliseconds."""
    times = ("95 %", "99 %")
    headings = ("first token ms", *times, "between tokens ms", *times, "batch fill", "failovers")
    table = _table(right=headings)
    earlier = {tier.name: tier.figures for tier in before}
    for tier in tiers:
        now, then = tier.figures, earlier.get(tier.name, pb.TierFigures())
        batches, fill = now.batches - then.batches, now.batch_fill - then.batch_fill
        table.add_row(
            Text(tier.name),
            *_quantiles(now.time_to_first_token, then.time_to_first_token),
            *_quantiles(now.inter_token_latency, then.inter_token_latency),
            f"{fill / batches:.0%}" if batches > 0 and fill >= 0 else "-",
            str(now.failovers),
        )
    return table


def _quantiles(now: pb.Distribution, before: pb.Distribution) -> list[str]:
    """Return median, 95th and 99th percentile of what was counted between two distributions.

    If a process has restarted in between, they are those since then.
    """
    counts = list(now.counts)
    if before.bounds == now.bounds:
        grown = [late - early for late, early in zip(now.counts, before.counts, strict=True)]
        counts = grown if min(grown, default=0) >= 0 else counts
    values = [quantile(now.bounds, counts, share) for share in (0.5, 0.95, 0.99)]
    return ["-" if value is None else f"{value * 1000:,.0f}" for value in values]


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Return a quantile of values counted in buckets, as Prometheus estimates it; None without values.

    It is interpolated within its bucket, and at most the largest bound.
    """
    rank, lower = share * sum(counts), 0.0
    if rank <= 0:
        return None
    for bound, count in zip(bounds, counts, strict=False):
        if count >= rank:
            return lower + (bound - lower) * rank / count
        rank, lower = rank - count, bound
    return lower


def tenants_table(now: Sequence[TenantUse], before: Sequence[TenantUse], elapsed: float) -> Table:
    """Return what the tenants with most requests used since the router started."""
    table = _table(first="tenant", right=("requests", "per s", "prompts", "tokens", "cost"))
    earlier = {use.tenant: use.requests for use in before}
    for use in now[:MAX_TENANTS]:
        rate = max(use.requests - earlier.get(use.tenant, 0), 0) / elapsed if elapsed > 0 else None
        table.add_row(
            Text(printable(use.tenant)) if use.tenant else Text("none", "dim"),
            f"{use.requests:,}",
            "-" if rate is None else f"{rate:.1f}",
            f"{use.prompt_tokens:,}",
            f"{use.completion_tokens:,}",
            money(use.cost) if use.HasField("cost") else "-",
        )
    return table


def _table(*left: str, right: Sequence[str], first: str = "tier") -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def savings(now: pb.ListTiersResponse) -> Text:
    """Compare the cost with that of always using the largest tier."""
    bill = now.bill
    if not (now.tiers and bill.HasField("cost") and bill.HasField("largest_tier_cost")):
        return Text("no prices: set --prices or HEADRACE_PRICES of the router to see costs", "dim")
    line = f"cost {money(bill.cost)}; always {now.tiers[-1].name}: {money(bill.largest_tier_cost)}"
    if bill.largest_tier_cost > 0:
        share = 1 - bill.cost / bill.largest_tier_cost
        line += f"; {'saved' if share >= 0 else 'lost'} {abs(share):.0%}"
    return Text(line, "bold")
