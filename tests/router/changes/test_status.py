"""ListTiers and Inspect report how the routing is being changed, of all processes, to those who may know."""

from __future__ import annotations

import pytest

from headrace.metrics import changes
from headrace.router.changes.scorer_files import ScorerFiles
from headrace.router.changes.scorers import Scorers
from headrace.router.changes.status import Status
from headrace.router.siblings import Siblings, inboxes
from headrace.router.state.thresholds import Thresholds
from headrace.routing.scoring import scorer
from headrace.routing.scoring.score import fingerprint
from tests.router.fake_batchers import FakeBatcher, routed


def status_of(siblings: Siblings) -> Status:
    files = ScorerFiles(None, None, tiers=["small", "large"])
    return Status(Scorers(files, Thresholds([0.0, 0.5])), None, siblings)


async def test_without_changes_only_the_scorer_is_reported() -> None:
    async with routed(small=FakeBatcher(), large=FakeBatcher()) as client:
        listed = (await client.list_tiers()).changes
        inspected = (await client.inspect()).router.changes

    assert listed.scorer == inspected.scorer == fingerprint(scorer.load())
    assert not listed.HasField("canary")


async def test_the_counts_of_all_processes_add_up() -> None:
    mail = inboxes(2)
    async with Siblings(0, mail).listening() as first, Siblings(1, mail).listening() as second:
        one = status_of(first)
        status_of(second)  # which answers with the same counts: both are in this process
        before = await one.changes()
        changes.SHADOW_REQUESTS.of(tier="large", outcome="ok").add()
        changes.SHADOW_VERDICTS.of(tier="large", verdict="better").add(2)
        changes.SHADOW_VERDICTS.of(tier="large", verdict="tie").add(3)
        changes.SHADOW_COST.of(tier="large").add(0.25)
        changes.DECISION_LOG_ROWS.of().add(5)
        after = await one.changes()
    for pair in mail:
        for end in pair:
            end.close()

    assert after.shadow.requests - before.shadow.requests == 2
    assert after.shadow.better - before.shadow.better == 4
    assert after.shadow.ties - before.shadow.ties == 6
    assert after.shadow.cost - before.shadow.cost == pytest.approx(0.5)
    assert after.decision_log.rows - before.decision_log.rows == 10
