"""`headrace top` shows what metrics show, and no more than its caller may see."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from headrace import errors
from headrace.cli.calls.connection import Connection
from headrace.cli.calls.top import Snapshot, quantile, screen, top
from headrace.client import Client
from headrace.router.figures import MAX_TENANTS, Figures
from headrace.router.siblings import Siblings, inboxes
from headrace.v1 import routing_changes_pb2 as changes_pb
from headrace.v1 import routing_service_pb2 as pb
from headrace.v1.admin_service_pb2 import TenantUse
from tests.harness import Mesh, collect, prompt

BOUNDS = (0.1, 0.2, 0.4)


def tier(times: tuple[int, ...], *, batches: int, fill: float, failovers: int = 0) -> pb.Tier:
    distribution = pb.Distribution(bounds=BOUNDS, counts=times)
    figures = pb.TierFigures(
        time_to_first_token=distribution,
        inter_token_latency=distribution,
        batches=batches,
        batch_fill=fill,
        failovers=failovers,
    )
    return pb.Tier(name="small", healthy=True, figures=figures)


def printed(*snapshots: Snapshot) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=120)
    console.print(screen(*snapshots))
    assert isinstance(console.file, io.StringIO)
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_quantiles_are_estimated_as_prometheus_does() -> None:
    assert quantile(BOUNDS, (10, 0, 0, 0), 0.5) == pytest.approx(0.05)
    assert quantile(BOUNDS, (5, 0, 5, 0), 0.9) == pytest.approx(0.36)
    assert quantile(BOUNDS, (0, 0, 0, 3), 0.99) == 0.4, "at most the largest bound"
    assert quantile(BOUNDS, (0, 0, 0, 0), 0.5) is None
    assert quantile((), (), 0.5) is None


def test_percentiles_and_fill_are_those_of_the_last_minute() -> None:
    before = Snapshot(0.0, pb.ListTiersResponse(tiers=[tier((90, 0, 0, 0), batches=90, fill=9.0)]))
    now = Snapshot(
        9.0, pb.ListTiersResponse(tiers=[tier((90, 10, 0, 0), batches=100, fill=16.5, failovers=2)])
    )

    assert ["small", "150", "195", "199", "150", "195", "199", "75%", "2"] in printed(now, before, before)
    assert ["small", "56", "150", "190", "56", "150", "190", "16%", "2"] in printed(now)


def test_after_a_restart_percentiles_are_those_since_then() -> None:
    before = Snapshot(0.0, pb.ListTiersResponse(tiers=[tier((90, 1, 1, 0), batches=90, fill=9.0)]))
    now = Snapshot(1.0, pb.ListTiersResponse(tiers=[tier((50, 2, 5, 0), batches=1, fill=0.5)]))
    now.listed.bill.charges.add(tier="small", answers=10)
    before.listed.bill.charges.add(tier="small", answers=5000)
    lines = printed(now, before, before)

    assert ["small", "57", "286", "377", "57", "286", "377", "-", "0"] in lines
    assert ["small", "10", "0.0"] in [line[:3] for line in lines]


def test_the_restart_of_a_process_is_no_negative_figure() -> None:
    before = Snapshot(0.0, pb.ListTiersResponse(tiers=[tier((90, 0, 0, 0), batches=90, fill=9.0)]))
    now = Snapshot(1.0, pb.ListTiersResponse(tiers=[tier((0, 1, 0, 0), batches=1, fill=0.5)]))

    assert ["small", "150", "195", "199", "150", "195", "199", "-", "0"] in printed(now, before, before)


def test_tenants_are_shown_with_their_rate_and_cost() -> None:
    listed = pb.ListTiersResponse()
    before = Snapshot(0.0, listed, [TenantUse(tenant="acme", requests=10)])
    use = [
        TenantUse(tenant="acme", requests=30, prompt_tokens=900, completion_tokens=70, cost=0.5),
        TenantUse(requests=1),
    ]
    now = Snapshot(2.0, listed, use)

    assert ["acme", "30", "10.0", "900", "70", "0.5000"] in printed(now, before)
    assert ["none", "1", "0.5", "0", "0", "-"] in printed(now, before)
    assert any("admin" in line for line in printed(Snapshot(0.0, listed)))


async def test_figures_and_tenants_of_a_mesh_are_shown(mesh: Mesh) -> None:
    request = prompt("hello")
    request.routing.tenant = "shown-by-top"
    await collect(mesh.client, request)
    console = Console(file=io.StringIO(), width=120)

    await top(Connection(target=f"127.0.0.1:{mesh.port}"), console, interval=1, once=True)

    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    (tenant,) = (line for line in lines if line[:1] == ["shown-by-top"])
    assert tenant[1] == "1"
    figures = next(line for line in lines if line[:1] == ["small"] and len(line) == 9)
    assert float(figures[1]) >= 0


async def test_tenants_are_hidden_from_callers_who_may_not_inspect(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(client: Client) -> None:
        raise errors.Forbidden("the scope admin is needed")

    monkeypatch.setattr(Client, "inspect", refuse)
    console = Console(file=io.StringIO(), width=120)

    await top(Connection(target=f"127.0.0.1:{mesh.port}"), console, interval=1, once=True)

    assert isinstance(console.file, io.StringIO)
    assert "no tenants: they are shown to callers with the scope admin" in console.file.getvalue()


async def test_the_processes_of_a_router_add_their_figures_up(mesh: Mesh) -> None:
    await collect(mesh.client, prompt("hello"))
    mail = inboxes(2)
    first, second = Siblings(0, mail), Siblings(1, mail)
    both, alone = Figures(["small"], first), Figures(["small"], Siblings())
    Figures(["small"], second)
    async with first.listening(), second.listening():
        one, two = (await alone.of_tiers())["small"], (await both.of_tiers())["small"]
        tenants, doubled = await alone.of_tenants(), await both.of_tenants()

    for end in (end for pair in mail for end in pair):
        end.close()
    # The metrics are those of this process, which both have.
    assert sum(two.time_to_first_token.counts) == 2 * sum(one.time_to_first_token.counts) > 0
    assert {use.tenant: use.requests for use in doubled} == {use.tenant: 2 * use.requests for use in tenants}
    assert len(tenants) <= MAX_TENANTS


def test_changes_of_the_routing_are_shown_where_they_are_in_use() -> None:
    measures = [
        changes_pb.CanaryMeasure(name="quality", p_value=0.31, limit=0.02, outcomes=40, fewest=30),
        changes_pb.CanaryMeasure(name="errors", p_value=1, limit=0.02, outcomes=12, fewest=50),
    ]
    canary = changes_pb.CanaryState(
        scorer="beef",
        share=0.1,
        control=changes_pb.ArmFigures(requests=900, failed=9, rated=350, quality=0.75, cost=0.5),
        candidate=changes_pb.ArmFigures(requests=100, rated=40, quality=0.7),
        measures=measures,
    )
    changes = changes_pb.RoutingChanges(
        scorer="cafe",
        canary=canary,
        shadow=changes_pb.ShadowFigures(requests=7, skipped=2, tokens=900, better=1, worse=2, ties=3),
        decision_log=changes_pb.DecisionLogFigures(rows=1000, dropped=1),
    )
    shown = printed(Snapshot(0.0, pb.ListTiersResponse(changes=changes)))
    lines = [" ".join(words) for words in shown]

    assert ["control", "cafe", "90%", "900", "1.0%", "350", "0.75", "0.5000"] in shown
    assert ["canary", "beef", "10%", "100", "0.0%", "40", "0.70", "-"] in shown
    assert "canary: quality p 0.31 (rolled back at 0.02); errors 12 of 50 outcomes" in lines
    assert "shadow: 7 answers, 2 skipped, 900 tokens; 6 judged: 1 better, 2 worse, 3 tie" in lines
    assert "decision log: 1,000 rows, 1 dropped" in lines

    canary.rolled_back, canary.share = "quality", 0.0
    rolled_back = printed(
        Snapshot(0.0, pb.ListTiersResponse(changes=changes_pb.RoutingChanges(scorer="cafe", canary=canary)))
    )
    assert any("it was worse in quality" in " ".join(line) for line in rolled_back)
    assert not any("shadow" in line or "decision" in line for line in rolled_back)
