"""Measure how often a canary is rolled back without a reason, and how soon if there is one.

    python -m benchmarks.routing.canary

It simulates rated answers, and judges after every 20th as the router does once per second. The candidate gets
a share of the requests by chance. The first table has equal arms: the share of trials that end with a
roll-back. The second has a worse candidate: the number of rated answers after which it is rolled back. The
third has one tenant that reports all answers of the candidate as bad, or as the only good ones.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from headrace.routing.changes.verdict import Evidence, Rule, judge

RULE = Rule(0.02, 20)  # of ratings
EVERY = 20
TYPICAL = 0.25  # as in the router


@dataclass(frozen=True)
class Trial:
    """Traffic to simulate.

    share     of requests that are the candidate's
    bad       probability of a bad outcome, of control and candidate
    outcomes  at most
    tenants   with equal traffic
    lie       outcomes that the first tenant reports for control and candidate; None: the true ones
    """

    share: float
    bad: tuple[float, float]
    outcomes: int
    tenants: int = 1
    lie: tuple[float, float] | None = None

    def rolled_back_after(self, seed: int) -> int | None:
        """Return the number of outcomes before the roll-back; None without one."""
        drawn, evidence = random.Random(seed), Evidence(self.share, TYPICAL)
        for count in range(1, self.outcomes + 1):
            tenant, candidate = drawn.randrange(self.tenants), drawn.random() < self.share
            badness = float(drawn.random() < self.bad[candidate])
            if self.lie is not None and tenant == 0:
                badness = self.lie[candidate]
            evidence.add(str(tenant), candidate=candidate, badness=badness)
            if count % EVERY == 0 and judge([evidence], RULE).worse:
                return count
        return None


def share_rolled_back(trial: Trial, trials: int) -> float:
    """Return the share of trials that end with a roll-back."""
    return sum(trial.rolled_back_after(seed) is not None for seed in range(trials)) / trials


def rows(trials: int) -> Iterable[str]:
    """Yield the tables as Markdown."""
    yield f"| share | bad outcomes of both | rolled back within 5,000 outcomes, {trials} trials |"
    yield "|---|---|---|"
    for share in (0.02, 0.1, 0.5):
        for both in (0.02, 0.25, 0.6):
            found = share_rolled_back(Trial(share, (both, both), 5000), trials)
            yield f"| {share:.0%} | {both:.0%} | {found:.1%} |"
    yield ""
    yield "| share | bad of control | of candidate | tenants | outcomes: median | 90 % | of candidate |"
    yield "|---|---|---|---|---|---|---|"
    few = max(trials // 4, 10)
    for share in (0.02, 0.1, 0.5):
        for bad in ((0.25, 0.35), (0.25, 0.45), (0.25, 0.65), (0.02, 0.2)):
            for tenants in (1, 10):
                trial = Trial(share, bad, 100_000, tenants)
                needed = sorted(trial.rolled_back_after(seed) or trial.outcomes for seed in range(few))
                median = statistics.median(needed)
                yield (
                    f"| {share:.0%} | {bad[0]:.0%} | {bad[1]:.0%} | {tenants} | {median:,.0f} | "
                    f"{needed[int(0.9 * few)]:,} | {median * share:,.0f} |"
                )
    yield ""
    yield "| tenants | equal arms, one reports it as bad | worse candidate, one reports the opposite |"
    yield "|---|---|---|"
    for tenants in (2, 4, 6, 10):
        false = share_rolled_back(Trial(0.1, (0.25, 0.25), 4000, tenants, (0.0, 1.0)), few)
        found = share_rolled_back(Trial(0.1, (0.25, 0.55), 8000, tenants, (1.0, 0.0)), few)
        yield f"| {tenants} | rolled back in {false:.0%} | rolled back in {found:.0%} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=200)
    for row in rows(parser.parse_args().trials):
        print(row, flush=True)


if __name__ == "__main__":
    main()
