"""The benchmark of replays knows the truth, and the estimates from its simulated log agree with it."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.routing.replay import Prompts, traffic
from headrace.routing.changes import replay as replaying
from headrace.routing.changes.estimating import compare
from headrace.routing.changes.replay import Candidate
from headrace.routing.scoring import scorer

TEXTS = [f"What is {number} times {number + 7}, and why?" for number in range(20)] + ["Hello!"] * 20


def prompts() -> Prompts:
    """Return forty prompts; the large tier is right about the first twenty alone."""
    loaded = scorer.load()
    good = np.array([[0.0, 1.0]] * 20 + [[1.0, 1.0]] * 20)
    cost = np.ones((40, 1)) * [1.0, 8.0]
    return Prompts(
        [loaded.score(text) for text in TEXTS],
        np.array([scorer.read(text) for text in TEXTS]),
        good,
        cost,
        np.array([len(text) for text in TEXTS]),
        np.full(40, 1 / 40),
    )


def test_the_truth_is_in_the_interval_of_the_estimate() -> None:
    drawn = prompts()
    run = traffic(drawn, 1500, 0.3, seed=1)
    replayed = replaying.replay(run.log, Candidate(thresholds=[0.0, 0.0]))
    quality = compare(
        replaying.sample(replayed, partial(replaying.quality, source="caller")), bounded=True
    ).difference
    cost = compare(replaying.sample(replayed, replaying.cost)).difference

    assert set(replayed.chosen) == {1}
    assert quality.low <= run.difference(drawn.good, replayed.chosen) <= quality.high
    assert cost.low <= run.difference(drawn.cost, replayed.chosen) <= cost.high
    assert run.difference(drawn.good, replayed.chosen) > 0.1
