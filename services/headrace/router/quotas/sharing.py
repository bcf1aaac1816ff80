"""Share the limits of tenants between processes: find the keeper of their budgets, and lease slices from it.

The keeper is the router with the lowest address of all that answer; with several processes per router, its
first process, through which the others lease. A process that reaches no keeper is its own, with its share of
the limits. At most one lease is in flight; requests whose slice is used up wait for the next one, which takes
as long as one call to the keeper.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field

from headrace import errors
from headrace.router.optional import optional
from headrace.router.quotas import messages
from headrace.router.quotas.accounts import Account, Accounts, Calendar
from headrace.router.quotas.amounts import Amounts, Refusal
from headrace.router.quotas.holder import Holder
from headrace.router.quotas.keeper import MAX_BYTES, Keeper, State, message_bytes
from headrace.router.quotas.links import KEEP, KEEPING, LEASE, Link, OpenChannel, RouterLink, SiblingLink
from headrace.router.siblings import Siblings
from headrace.runtime.discovery import Discovery
from headrace.v1 import quota_service_pb2 as pb

log = logging.getLogger(__name__)

CATCH_UP_CALLS = 10  # between two reports
REPORT_SECONDS = 1.0  # between reports to the keeper, and between searches for one with a lower address


@dataclass(slots=True)
class _Waiter:
    """A request that waits for a lease; the result is why it is not admitted, if so."""

    account: Account
    need: Amounts
    result: asyncio.Future[Refusal | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Sharing:
    """Takes what requests need: from the budgets of this process, or from slices leased from a keeper.

    incarnation   identifies this process

    targets       of all routers that share the limits, this one included; none: it is the only one
    processes     of each router
    """

    def __init__(
        self,
        accounts: Accounts,
        calendar: Calendar,
        *,
        targets: Sequence[str] = (),
        processes: int = 1,
        siblings: Siblings,
        open_channel: OpenChannel,
    ) -> None:
        self.incarnation = secrets.randbits(63) | 1
        self._accounts = accounts
        self._calendar = calendar
        self._shared = bool(targets) or processes > 1
        self._discovery = Discovery(targets)
        self._processes = processes
        self._siblings = siblings
        self._first_process = SiblingLink(siblings, LEASE)
        self._open_channel = open_channel
        self._keeper = Keeper(accounts, calendar)
        self._keeper.know(processes, time.monotonic())
        self._holder = Holder()
        self._addresses: list[str] = []
        self._own_address = ""
        self._links: dict[str, Link] = {}
        # The keeper that this process leases from; None: itself. What was agreed with it:
        self._link: Link | None = None
        self._keeper_incarnation = 0
        self._version = 0
        self._to_bring: list[State] = []  # what it has not received
        self._reported = 0.0
        self._is_behind = False
        self._waiting: list[_Waiter] = []
        self._kick = asyncio.Event()
        self._search = asyncio.Event()
        siblings.on_ask(LEASE, self._lease_for_sibling)
        siblings.on_ask(KEEP, self._keep_for_sibling)

    @property
    def keeps(self) -> bool:
        """Whether this process takes from its own budgets."""
        return self._link is None

    @property
    def share(self) -> float:
        """The part of the limits that the keeper of this process gives out."""
        return self._keeper.share if self._link is None else self._holder.share

    async def take(self, account: Account, need: Amounts, now: float) -> Refusal | None:
        """Take what a request needs; return why it is not admitted, if so."""
        if self._link is None:
            refusal = self._keeper.take(account, need, now)
        elif self._holder.take(account, need):
            refusal = None
        elif (refusal := self._holder.refused(account, need, now)) is None:
            return await self._wait_for_lease(account, need)
        if refusal is None:
            self._count(account, need)
        return refusal

    def settle(self, account: Account, correction: Amounts, streams: int) -> None:
        """Correct what a request has taken, and end its *streams*."""
        account.streams -= streams
        if self._shared:
            account.used.add(correction)
        if self._link is None:
            self._keeper.charge(account, correction)
        else:
            self._holder.charge(account, correction)
            self._holder.free(account, streams)

    async def serve(self, request: pb.LeaseRequest) -> pb.LeaseResponse:
        """Answer another router. Raises InvalidRequest, and Unavailable while no process keeps budgets."""
        if self._siblings.number != KEEPING:
            return await SiblingLink(self._siblings, KEEP).lease(request)
        return self._keep(request)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Share while the block runs. The block is entered when a keeper was searched for once."""
        if not self._shared:
            yield
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                self._know(await self._discovery.addresses())
                await self._find_keeper()
                await self._turn()
                running = [
                    tasks.create_task(self._follow_addresses()),
                    tasks.create_task(self._keep_searching()),
                    tasks.create_task(self._keep_leasing()),
                ]
                yield
                for task in running:
                    task.cancel()
        finally:
            await self._leave()
            self._switch(None, self.incarnation)
            self._answer_waiting(self._waiting)
            for link in self._links.values():
                await link.close()

    # Leases.

    async def _wait_for_lease(self, account: Account, need: Amounts) -> Refusal | None:
        waiter = _Waiter(account, need)
        self._holder.follow(account)
        self._waiting.append(waiter)
        self._kick.set()
        try:
            return await waiter.result
        except asyncio.CancelledError:
            if waiter.result.done() and not waiter.result.cancelled() and waiter.result.result() is None:
                back = Amounts(-need.requests, -need.tokens, -need.cost)
                self.settle(account, back, need.streams)
            raise

    async def _keep_leasing(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_SECONDS):
                    await self._kick.wait()
            self._kick.clear()
            await self._turn()

    async def _turn(self) -> None:
        """Report to the keeper and lease from it, and decide on the requests that wait for it."""
        with optional("quotas"):
            self._keeper.tick(time.monotonic())
        waiting, self._waiting = self._waiting, []
        link = self._link
        try:
            waiting = [one for one in waiting if not self._decide_early(one)]
            if not waiting and time.monotonic() - self._reported < REPORT_SECONDS / 2:
                return
            self._reported = time.monotonic()
            if link is not None:
                waiting = await self._lease(link, waiting)
        except errors.HeadraceError as error:
            self._lose(link, str(error))
        except Exception as error:
            log.exception("lease of quotas failed")
            self._lose(link, type(error).__name__)
        if self._link is not link and self._link is not None:  # meanwhile, another keeper was found
            self._waiting += waiting
            self._kick.set()
        else:
            self._answer_waiting(waiting)
        with optional("quotas"), suppress(errors.HeadraceError):
            await self._catch_up()

    async def _lease(self, link: Link, waiting: list[_Waiter]) -> list[_Waiter]:
        """Lease for requests that wait; return those that can be decided now."""
        while self._to_bring:
            states, size = [], 0
            while self._to_bring and size < MAX_BYTES:
                states.append(state := self._to_bring.pop())
                size += message_bytes(state.key)
            await self._call(link, messages.fill_request(self._request(), (), states))
        waiters = ((waiter.account, waiter.need) for waiter in waiting)
        asks = self._holder.asks(self._holder.sums(waiters), time.monotonic())
        response = await self._call(
            link, messages.fill_request(self._request(), (ask for _, ask in asks), ())
        )
        grants, states = messages.grants_of(response, len(asks)), messages.states_of(response)
        self._adopt(response, states)
        for (account, ask), granted in zip(asks, grants, strict=True):
            self._holder.grant(account, ask, granted)
        asked = {ask.key for _, ask in asks}
        later = [waiter for waiter in waiting if waiter.account.key not in asked]
        if later:
            self._waiting += later
            self._kick.set()
        return [waiter for waiter in waiting if waiter.account.key in asked]

    def _adopt(self, response: pb.LeaseResponse, states: list[State]) -> None:
        self._holder.share, self._version = response.share, response.version
        self._keeper.adopt(states, response.share, time.monotonic())
        self._is_behind = sum(message_bytes(state.key) for state in states) >= MAX_BYTES

    async def _catch_up(self) -> None:
        """Receive changes that did not fit into one response."""
        for _ in range(CATCH_UP_CALLS):
            if (link := self._link) is None or not self._is_behind or self._waiting:
                return
            response = await self._call(link, self._request())
            messages.grants_of(response, 0)
            self._adopt(response, messages.states_of(response))

    async def _leave(self) -> None:
        """Report to the keeper for the last time, if it answers."""
        if self._link is not None:
            request = self._request()
            request.leaving = True
            asks = self._holder.asks({}, time.monotonic())
            with suppress(errors.HeadraceError):
                await self._link.lease(messages.fill_request(request, (ask for _, ask in asks), ()))

    def _request(self) -> pb.LeaseRequest:
        return pb.LeaseRequest(
            incarnation=self.incarnation, keeper=self._keeper_incarnation, version=self._version
        )

    async def _call(self, link: Link, request: pb.LeaseRequest) -> pb.LeaseResponse:
        response = await link.lease(request)
        if response.incarnation != self._keeper_incarnation:
            raise errors.Unavailable("another process has its address now")
        return response

    def _answer_waiting(self, waiting: list[_Waiter]) -> None:
        now = time.monotonic()
        for waiter in waiting:
            if not waiter.result.done():
                waiter.result.set_result(self._decide(waiter.account, waiter.need, now))

    def _decide_early(self, waiter: _Waiter) -> bool:
        """Admit a request whose slice is enough since the last lease; return whether it is decided."""
        if not waiter.result.done() and self._link is not None:
            if not self._holder.take(waiter.account, waiter.need):
                return False
            self._count(waiter.account, waiter.need)
            waiter.result.set_result(None)
        return waiter.result.done()

    def _count(self, account: Account, need: Amounts) -> None:
        account.streams += need.streams
        if self._shared:
            account.used.add(need)

    def _decide(self, account: Account, need: Amounts, now: float) -> Refusal | None:
        if self._link is None:
            refusal = self._keeper.take(account, need, now)
        elif self._holder.take(account, need):
            refusal = None
        else:
            refusal = self._holder.refuse(account, need, now, self._calendar.left(now))
        if refusal is None:
            self._count(account, need)
        return refusal

    # The keeper.

    async def _keep_searching(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_SECONDS):
                    await self._search.wait()
            self._search.clear()
            with optional("quotas"):
                await self._find_keeper()

    async def _follow_addresses(self) -> None:
        async with aclosing(self._discovery.changes()) as changes:
            async for addresses in changes:
                self._know(addresses)
                self._search.set()

    def _know(self, addresses: frozenset[str]) -> None:
        self._addresses = sorted(addresses)
        routers = len(addresses) + (self._own_address not in addresses if self._own_address else 0)
        self._keeper.know(max(routers, 1) * self._processes, time.monotonic())

    async def _find_keeper(self) -> None:
        """Find the router with the lowest address that answers, unless it is the current keeper."""
        if self._siblings.number != KEEPING:
            if self._link is None and (incarnation := await self._probe(self._first_process)):
                self._switch(self._first_process, incarnation)
            return
        current = self._own_address if self._link is None else self._link.address
        candidates = (
            self._addresses[: self._addresses.index(current)]
            if current in self._addresses
            else self._addresses
        )
        links = [self._link_to(address) for address in candidates]
        for link, incarnation in zip(links, await asyncio.gather(*map(self._probe, links)), strict=True):
            if incarnation == self.incarnation:
                self._own_address = link.address
                self._know(frozenset(self._addresses))
                self._switch(None, incarnation)
                break
            if incarnation:
                self._switch(link, incarnation)
                break
        for address in self._links.keys() - set(self._addresses):
            if self._links[address] is not self._link:
                await self._links.pop(address).close()

    async def _probe(self, link: Link) -> int:
        """Return the incarnation of the process that answers; 0 if there is none."""
        with suppress(errors.HeadraceError):
            return (await link.lease(pb.LeaseRequest(incarnation=self.incarnation))).incarnation
        return 0

    def _link_to(self, address: str) -> Link:
        if address not in self._links:
            self._links[address] = RouterLink(
                address, self._discovery.server_name(address), self._open_channel
            )
        return self._links[address]

    def _lose(self, link: Link | None, problem: str) -> None:
        if link is not None and self._link is link:
            log.warning("quota keeper lost", extra={"keeper": link.address, "problem": problem})
            self._switch(None, self.incarnation)
            self._search.set()

    def _switch(self, link: Link | None, incarnation: int) -> None:
        """Lease from another keeper, or from none."""
        if link is self._link and (link is None or incarnation == self._keeper_incarnation):
            return
        self._link, self._keeper_incarnation, self._version = link, incarnation, 0
        self._holder.restart([one for one in self._accounts if one.used.requests] if link is not None else ())
        self._to_bring = self._keeper.lease_elsewhere(link is not None, time.monotonic())
        log.info("quota keeper", extra={"keeper": "this process" if link is None else link.address})

    # Other processes.

    def _keep(self, request: pb.LeaseRequest) -> pb.LeaseResponse:
        """Answer as the keeper of another process. Raises InvalidRequest."""
        response = pb.LeaseResponse(incarnation=self.incarnation)
        if request.keeper != self.incarnation:
            return response
        asks, states, now = messages.asks_of(request), messages.states_of(request), time.monotonic()
        self._keeper.merge(request.incarnation, states, now)
        if request.leaving:
            self._keeper.leave(request.incarnation, asks, now)
            return response
        if not asks and states:
            return response  # more of them follow, before the first lease
        grants = self._keeper.lease(request.incarnation, asks, now)
        response.share = self._keeper.share
        response.version, changed = self._keeper.changes(request.version, now)
        return messages.fill_response(response, grants, changed)

    async def _keep_for_sibling(self, data: bytes) -> bytes:
        return self._keep(pb.LeaseRequest.FromString(data)).SerializeToString()

    async def _lease_for_sibling(self, data: bytes) -> bytes:
        request = pb.LeaseRequest.FromString(data)
        if (link := self._link) is None:
            return self._keep(request).SerializeToString()
        return (await link.lease(request)).SerializeToString()
