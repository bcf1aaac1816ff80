"""Send requests of the router's own to tiers: shadow requests, and questions to a judge model.

They are nobody's: their tokens are on a bill of their own, they count towards no share and no quota, they
have the lowest priority, and they belong to no conversation. Their tenant stays the caller's, because it
separates what batchers keep in their prefix caches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from headrace.deadline import Deadline
from headrace.metrics import changes
from headrace.metrics.requests import finish_name
from headrace.router.answering.attempts import Outgoing, clear_details, on_tier
from headrace.router.answering.used_tokens import UsedTokens
from headrace.router.changes.answered import Beginning
from headrace.router.optional import optional
from headrace.router.state.bills import Bill
from headrace.router.state.tiers import Tiers
from headrace.routing.scoring.conversation import Turn
from headrace.routing.tier_view import Price
from headrace.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class OwnAnswer:
    """An answer to one of the router's own requests.

    text      its `Beginning`
    finish    why it is complete, such as "stop"
    """

    text: str
    finish: str


class OwnRequests:
    """Sends requests to tiers, and bills them.

    total     the bill for all of them

    prices    of the tiers that have one
    seconds   the longest that one request may take
    """

    def __init__(self, tiers: Tiers, prices: Mapping[str, Price], *, seconds: float) -> None:
        self._tiers = tiers
        self._prices = prices
        self._seconds = seconds
        self.total = self.new_bill()

    async def send(self, tier: str, request: pb.GenerateRequest, bill: Bill) -> OwnAnswer:
        """Send *request* to the batchers of *tier*, and add what it used to *bill* and to the total.

        Raises a HeadraceError if there is no complete answer.
        """
        own = self.new_bill()
        text = Beginning()
        used, usage = UsedTokens(), pb.Usage()
        finish = ""
        deadline = Deadline.after(self._seconds, time.monotonic())
        outgoing = Outgoing(request, deadline, failover_seconds=0.0)
        try:
            async with aclosing(on_tier(self._tiers[tier], _Counted(own), outgoing)) as responses:
                async for response in responses:
                    event = response.WhichOneof("event")
                    if event == "accepted":
                        used.accept(response.accepted)
                    elif event == "delta":
                        used.completion += response.delta.token_count
                        text.add(response.delta.text)
                    elif event == "finish":
                        usage, finish = response.finish.usage, finish_name(response.finish.reason)
                        used.finish(usage)
        finally:
            with optional("bill"):
                if own.charges:
                    own.add_answer(
                        tier,
                        prompt_tokens=used.prompt_of(request),
                        tokens=used.completion,
                        wasted_tokens=usage.wasted_tokens,
                        cached_tokens=usage.cached_tokens,
                    )
                self._record(own)
                bill.add(own)
        return OwnAnswer(text.text, finish)

    def new_bill(self) -> Bill:
        """Return an empty bill of these tiers."""
        return Bill([tier.name for tier in self._tiers.tiers], self._prices)

    def _record(self, bill: Bill) -> None:
        self.total.add(bill)
        for tier, charge in bill.charges:
            for kind, tokens in (
                ("prompt", charge.prompt_tokens),
                ("completion", charge.completion_tokens),
                ("wasted", charge.wasted_tokens),
            ):
                if tokens:
                    changes.SHADOW_TOKENS.of(tier=tier, kind=kind).add(tokens)
            if cost := bill.cost_of(tier):
                changes.SHADOW_COST.of(tier=tier).add(cost)


def shadow_request(request: pb.GenerateRequest) -> pb.GenerateRequest:
    """Return the same request for another tier: same input, seed and sampling, but nobody's conversation."""
    made = pb.GenerateRequest()
    made.CopyFrom(request)
    made.request_id = f"{request.request_id[:120]}-shadow"
    made.ClearField("stream")
    clear_details(made.sampling)
    _set_routing(made, request.routing.tenant)
    return made


def judge_request(turns: Sequence[Turn], *, name: str, tenant: str, max_tokens: int) -> pb.GenerateRequest:
    """Return a request for the short reply of a judge model, without randomness.

    name     its request id
    tenant   whose text it contains
    """
    messages = [pb.Message(role=turn.role, content=turn.text) for turn in turns]
    made = pb.GenerateRequest(
        request_id=name,
        chat=pb.Chat(messages=messages),
        sampling=pb.Sampling(temperature=0.0, seed=0, max_tokens=max_tokens),
    )
    _set_routing(made, tenant)
    return made


def _set_routing(request: pb.GenerateRequest, tenant: str) -> None:
    request.routing.CopyFrom(pb.Routing(tenant=tenant, priority=0, cascade=False))


class _Counted:
    """Counts the attempts of one request on its bill."""

    def __init__(self, bill: Bill) -> None:
        self._bill = bill

    def count_attempt(self, tier: str) -> None:
        self._bill.add_attempt(tier)
