"""Judge pairs of answers for the shadow: by rules, by their results, or by a model of one of the tiers."""

from __future__ import annotations

import asyncio
import secrets
from typing import Protocol

from headrace.router.shadow.own_requests import OwnRequests, judge_request
from headrace.router.state.bills import Bill
from headrace.routing.changes import judging
from headrace.routing.changes.judging import Pair, Verdict
from headrace.routing.drafts.check import DraftChecker
from headrace.v1 import generation_pb2 as pb

RULES, EXACT = "rules", "exact"
REPLY_TOKENS = 8  # of a judge model; a longer reply is none of the three words


class Judge(Protocol):
    """Compares two answers.

    name   "rules", "exact", or the tier of the judge model
    tier   that it asks; empty: none
    """

    name: str
    tier: str

    async def judge(self, pair: Pair, request: pb.GenerateRequest, bill: Bill, *, larger: bool) -> Verdict:
        """Compare the answers to *request*. Adds what that used to *bill*.

        larger   whether the second answer is of the larger tier

        Raises a HeadraceError if a model that it asks cannot answer.
        """
        ...


class RulesJudge:
    """Compares what the draft check finds against each answer."""

    name, tier = RULES, ""

    def __init__(self, checker: DraftChecker) -> None:
        self._checker = checker

    async def judge(self, pair: Pair, request: pb.GenerateRequest, bill: Bill, *, larger: bool) -> Verdict:
        """See `Judge`."""
        # In a thread: the worst answers take tens of milliseconds.
        return await asyncio.to_thread(judging.by_rules, pair, self._checker)


class ResultJudge:
    """Compares the final results of both answers."""

    name, tier = EXACT, ""

    async def judge(self, pair: Pair, request: pb.GenerateRequest, bill: Bill, *, larger: bool) -> Verdict:
        """See `Judge`."""
        return await asyncio.to_thread(judging.by_result, pair, second_is_larger=larger)


class ModelJudge:
    """Asks the model of a tier, twice with the answers swapped."""

    def __init__(self, tier: str, own: OwnRequests) -> None:
        self.name = self.tier = tier
        self._own = own

    async def judge(self, pair: Pair, request: pb.GenerateRequest, bill: Bill, *, larger: bool) -> Verdict:
        """See `Judge`."""
        replies = []
        for place, turns in enumerate(judging.questions(pair, secrets.token_hex(8))):
            asked = judge_request(
                turns,
                name=f"{request.request_id[:120]}-judge{place + 1}",
                tenant=request.routing.tenant,
                max_tokens=REPLY_TOKENS,
            )
            replies.append((await self._own.send(self.tier, asked, bill)).text)
        return judging.by_replies(*replies)


def judge_named(name: str, checker: DraftChecker, own: OwnRequests) -> Judge | None:
    """Return the judge of `--judge`: "rules", "exact", or the name of a tier; None for an empty name."""
    if not name:
        return None
    if name == RULES:
        return RulesJudge(checker)
    return ResultJudge() if name == EXACT else ModelJudge(name, own)
