"""`headrace top`: the load of a mesh, and its cost since the router started."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headrace import errors
from headrace.v1 import generation_pb2 as generation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, RenderableType

    from headrace.cli.calls.connection import Connection
    from headrace.v1 import routing_service_pb2 as pb


async def top(connection: Connection, console: Console, *, interval: float, once: bool) -> None:
    """Show the mesh behind a router every *interval* seconds until cancelled.

    Keeps polling if the router becomes unavailable. Raises a HeadraceError if the first call fails.
    """
    async with connection.open() as client:
        before, then = await client.list_tiers(), time.monotonic()
        if once:
            console.print(screen(before, None, 0.0))
            return
        with Live(screen(before, None, 0.0), console=console, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(interval)
                try:
                    now = await client.list_tiers()
                except errors.Unavailable as error:
                    live.update(Text(f"{error.message}; polling until it is back", "red"), refresh=True)
                    continue
                elapsed = time.monotonic() - then
                live.update(screen(now, before, elapsed), refresh=True)
                before, then = now, time.monotonic()


def screen(now: pb.ListTiersResponse, before: pb.ListTiersResponse | None, elapsed: float) -> RenderableType:
    """Return the load, and the bill since the start; rates are since *before*, *elapsed* seconds ago."""
    if not now.HasField("bill"):
        return Group(load_table(now.tiers), Text("no bill: a router shows it to administrators only", "dim"))
    return Group(load_table(now.tiers), bill_table(now, before, elapsed), savings(now))


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
        rate = (charge.answers - earlier.get(tier.name, 0)) / elapsed if elapsed > 0 else None
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


def _table(*left: str, right: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("tier", no_wrap=True)
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


def money(amount: float) -> str:
    """Format an amount with two decimal places, more if it is small: "12.30", "0.0042", "1.2e-06"."""
    if amount == 0 or amount >= 1:
        return f"{amount:,.2f}"
    return f"{amount:.4f}" if amount >= 0.001 else f"{amount:.2g}"
