"""Admit requests within the limits of their tenants, and account for what they use.

A request reserves what it will probably use, and the reservation is corrected when it ends: tokens of prompt
and answer as its caller sees them, and cost as on its bill. In shadow mode, requests over a limit are counted
and admitted.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

from headrace import errors
from headrace.metrics import catalogue
from headrace.router.answering.prompts import estimated_tokens
from headrace.router.optional import optional
from headrace.router.permissions import lower_priority, tenant_of
from headrace.router.quotas.accounts import Account, Accounts, Calendar
from headrace.router.quotas.amounts import Amounts, Refusal
from headrace.router.quotas.limits import Limits, Rules
from headrace.router.quotas.links import OpenChannel
from headrace.router.quotas.sharing import Sharing
from headrace.router.siblings import Siblings
from headrace.router.state.bills import Bill
from headrace.routing.tier_view import Price
from headrace.runtime.security.identity import Identity
from headrace.v1 import generation_pb2 as pb

log = logging.getLogger(__name__)

ANSWER_TOKENS = 256  # of an answer without max_tokens
LEAST_COST = 1e-9  # so that a request without a price still needs a budget that is not spent

_PER = {
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
    "concurrent_streams": "concurrent streams",
    "cost_per_day": "of cost per day",
}


class Admission:
    """One admitted request."""

    __slots__ = ("_account", "_need", "_sharing")

    def __init__(self, sharing: Sharing, account: Account, need: Amounts) -> None:
        self._sharing = sharing
        self._account = account
        self._need = need

    def end(self, bill: Bill) -> None:
        """Account for what the request has used."""
        correction, need = Amounts(), self._need
        with optional("quotas"):
            if need.tokens:
                correction.tokens = bill.answer_tokens - need.tokens
            if need.cost:
                correction.cost = bill.known_cost - need.cost
        self._sharing.settle(self._account, correction, self._need.streams)


class Quotas:
    """The limits of all tenants.

    sharing      takes from their budgets

    shadow       whether requests over a limit are admitted and only counted
    prices       of the tiers
    most_tokens  returns the most tokens of an answer; 0 if it is not known
    """

    def __init__(
        self,
        rules: Rules,
        *,
        shadow: bool = False,
        prices: Iterable[Price] = (),
        most_tokens: Callable[[], int] = lambda: 0,
        targets: Sequence[str] = (),
        processes: int = 1,
        siblings: Siblings,
        open_channel: OpenChannel,
    ) -> None:
        self._rules = rules
        self._shadow = shadow
        self._calendar = Calendar()
        self._accounts = Accounts(rules.limits)
        self.sharing = Sharing(
            self._accounts,
            self._calendar,
            targets=targets,
            processes=processes,
            siblings=siblings,
            open_channel=open_channel,
        )
        prices = list(prices)
        self._prompt_price = max((price.prompt for price in prices), default=0.0) / 1e6
        self._completion_price = max((price.completion for price in prices), default=0.0) / 1e6
        self._most_tokens = most_tokens
        if rules.limit_cost and not prices:
            log.warning("cost_per_day has no effect without --prices")

    async def admit(self, identity: Identity, request: pb.GenerateRequest) -> Admission | None:
        """Reserve what a request will use, and lower its priority; return None if no limit applies.

        Raises TenantQuota.
        """
        tenant = tenant_of(request, identity)
        limits = self._rules.limits(tenant, identity.quota)
        if not self._shadow:
            lower_priority(request, limits.max_priority)
        if not limits.apply:
            return None
        return await self._take(tenant, limits, self._need(limits, request))

    async def admit_dry_run(self, identity: Identity, request: pb.GenerateRequest) -> None:
        """Count a request that generates nothing: as a request only. Raises TenantQuota."""
        tenant = tenant_of(request, identity)
        limits = self._rules.limits(tenant, identity.quota)
        if limits.apply:
            await self._take(tenant, limits, Amounts(requests=1.0))

    def tenant_class(self, tenant: str, quota: str) -> str:
        """Return the class of a tenant whose credentials have the class *quota*, for metrics."""
        return self._rules.limits(tenant, quota).tenant_class

    @asynccontextmanager
    async def running(self, poll_seconds: float) -> AsyncGenerator[None, None]:
        """Share the limits with other processes and read their file again when it changes."""
        async with self.sharing.running(), asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch(poll_seconds))
            try:
                yield
            finally:
                watching.cancel()

    async def _take(self, tenant: str, limits: Limits, need: Amounts) -> Admission | None:
        now, key = time.monotonic(), (tenant, limits.name)
        account = self._accounts.find(key) or self._accounts.get(key, now, self._calendar.day(now))
        if (refusal := await self.sharing.take(account, need, now)) is None:
            return Admission(self.sharing, account, need)
        mode = "shadow" if self._shadow else "enforced"
        catalogue.QUOTA_REFUSALS.of(tenant_class=limits.tenant_class, limit=refusal.limit, mode=mode).add()
        log.info("request over quota", extra={"tenant": tenant, "limit": refusal.limit, "mode": mode})
        if self._shadow:
            return None
        raise _error(tenant, refusal)

    def _need(self, limits: Limits, request: pb.GenerateRequest) -> Amounts:
        """Estimate what a request will use."""
        need = Amounts(1.0, streams=1)
        if limits.tokens_per_minute == math.inf == limits.cost_per_day:
            return need
        prompt = estimated_tokens(request)
        sampling = request.sampling
        answer = sampling.max_tokens if sampling.HasField("max_tokens") else ANSWER_TOKENS
        answer = min(answer, self._most_tokens() or answer)
        if limits.tokens_per_minute != math.inf:
            need.tokens = prompt + answer
        if limits.cost_per_day != math.inf:
            need.cost = max(prompt * self._prompt_price + answer * self._completion_price, LEAST_COST)
        return need

    async def _watch(self, poll_seconds: float) -> None:
        while True:
            await asyncio.sleep(poll_seconds)
            self._calendar.sync()
            with optional("quotas"):
                if self._rules.refresh():
                    self._accounts.refresh()


def _error(tenant: str, refusal: Refusal) -> errors.TenantQuota:
    who = f"tenant {tenant!r}" if tenant else "callers without a tenant"
    advice = "ask the operator for a higher limit"
    if refusal.retry_after is not None:
        advice = f"retry after {refusal.retry_after:.3g} s"
    return errors.TenantQuota(
        f"{who} reached the limit of {refusal.most:g} {_PER[refusal.limit]}: {advice}",
        retry_after=refusal.retry_after,
        subject=f"tenant:{tenant}",
        limit=refusal.limit,
        value=f"{refusal.most:g}",
    )
