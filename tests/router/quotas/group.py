"""Several routers that share limits, with a wire from each to each other that can be cut."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc

from headrace import errors
from headrace.channel import CHANNEL_OPTIONS
from headrace.cli.launch.mesh import reserved_ports
from headrace.client import chat
from headrace.router.quotas.accounts import Account
from headrace.router.quotas.admission import Admission, Quotas
from headrace.router.quotas.limits import Limits, Rules
from headrace.router.quotas.service import LEASE, SERVICES, QuotaServicer
from headrace.router.siblings import Siblings
from headrace.router.state.bills import Bill
from headrace.routing.tier_view import Price
from headrace.runtime.security.identity import ANONYMOUS
from headrace.runtime.serving.server import serving
from headrace.v1.quota_service_pb2_grpc import add_QuotaServiceServicer_to_server
from tests.harness import eventually
from tests.tier import Wire

PRICES = {"only": Price(0.0, 1e6)}  # a token of an answer costs 1


@dataclass
class Member:
    """One router of the group."""

    name: str
    quotas: Quotas
    admissions: list[Admission] = field(default_factory=list)

    async def admit(self, tenant: str = "acme", tokens: int = 1) -> bool:
        """Return whether a request for an answer of *tokens* is admitted; it then runs until `end`."""
        request = chat("x", max_tokens=tokens)
        request.routing.tenant = tenant
        try:
            admission = await self.quotas.admit(ANONYMOUS, request)
        except errors.TenantQuota:
            return False
        assert admission is not None
        self.admissions.append(admission)
        return True

    async def admit_many(self, count: int, tenant: str = "acme", tokens: int = 1) -> int:
        """Return how many of *count* requests, one after the other, are admitted."""
        return sum([await self.admit(tenant, tokens) for _ in range(count)])

    def end(self, tokens: int = 1) -> None:
        """End all its requests, whose answers had so many tokens."""
        for admission in self.admissions:
            bill = Bill(["only"], PRICES)
            bill.add_attempt("only")
            bill.add_answer("only", prompt_tokens=0, tokens=tokens)
            admission.end(bill)
        self.admissions.clear()

    def account(self, tenant: str = "acme") -> Account:
        """Return its account of a tenant, or an empty one."""
        found = (each for each in self.quotas._accounts if each.key[0] == tenant)
        return next(found, Account((tenant, ""), 0, Limits(), 1.0, 0, 0.0))

    def gives_out(self, share: float) -> bool:
        """Return whether its keeper gives out this part of the limits."""
        return abs(self.quotas.sharing.share - share) < 0.01


@dataclass
class Group:
    """The routers, by order of their addresses, and the wires between them, by their places."""

    members: list[Member]
    wires: dict[tuple[int, int], Wire]
    stacks: list[AsyncExitStack]
    began: float = field(default_factory=time.monotonic)

    @property
    def minutes(self) -> float:
        """Minutes since the group was ready: by this part of the limits, budgets have refilled."""
        return (time.monotonic() - self.began) / 60

    async def split(self, *parts: Collection[int]) -> None:
        """Cut the wires between members of different parts, and join those within."""
        part_of = {place: number for number, part in enumerate(parts) for place in part}
        for (one, other), wire in self.wires.items():
            if part_of[one] != part_of[other]:
                wire.cut()
            elif wire.cuts:
                wire.cuts = 0
                await wire.join()

    async def start(self, place: int) -> None:
        """Start a router."""
        quotas, stack = self.members[place].quotas, self.stacks[place]
        await stack.enter_async_context(quotas.running(0.05))
        server = await stack.enter_async_context(
            serving(
                partial(add_QuotaServiceServicer_to_server, QuotaServicer(quotas.sharing)),
                SERVICES,
                host="127.0.0.1",
                port=0,
                drain_seconds=0,
                untracked=frozenset({LEASE}),
                ready=lambda: True,
            )
        )
        for (_, other), wire in self.wires.items():
            if other == place:
                wire.target = server.port

    async def stop(self, place: int) -> None:
        """Stop a router in order."""
        await self.stacks[place].aclose()

    async def settled(self, *shares: float) -> None:
        """Wait until the members give out, or lease from one that gives out, these shares."""
        for member, share in zip(self.members, shares, strict=True):
            await eventually(partial(member.gives_out, share))


@asynccontextmanager
async def group(
    path: Path, count: int = 3, *, start: Sequence[int] | None = None
) -> AsyncGenerator[Group, None]:
    """Run routers that share the limits of a file.

    start   the places of those to start; all by default
    """
    names = [f"router-{place}:1" for place in range(count)]
    async with AsyncExitStack() as stack:
        ports = iter(stack.enter_context(reserved_ports(count * count)))
        wires: dict[tuple[int, int], Wire] = {}
        members, stacks = [], []
        for name in names:
            channels: dict[str, int] = {}

            def open_channel(address: str, name: str, channels: dict[str, int]) -> grpc.aio.Channel:
                return grpc.aio.insecure_channel(f"127.0.0.1:{channels[address]}", options=CHANNEL_OPTIONS)

            quotas = Quotas(
                Rules(path),
                prices=PRICES.values(),
                targets=names,
                siblings=Siblings(),
                open_channel=partial(open_channel, channels=channels),
            )
            members.append((Member(name, quotas), channels))
            stacks.append(await stack.enter_async_context(AsyncExitStack()))
        for one, (_, channels) in enumerate(members):
            for other, name in enumerate(names):
                wire = wires[one, other] = Wire(0, next(ports))
                channels[name] = wire.port
                await wire.join()
                stack.callback(wire.cut)
                stack.callback(wire.thaw)
        routers = Group([member for member, _ in members], wires, stacks)
        for place in range(count) if start is None else start:
            await routers.start(place)
        yield routers
