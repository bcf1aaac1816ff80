"""A logged request is decided again as the router would have decided it, with a candidate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from headrace.routing.changes import replay as replaying
from headrace.routing.changes.records import DECISION, Logged, of_decision, parse
from headrace.routing.changes.replay import Candidate, clusters, quality, replay, sample
from headrace.routing.policy import decide
from headrace.routing.request import Hints, RoutingRequest
from headrace.routing.scoring import prompt_features, scorer
from headrace.routing.scoring.conversation import Carried, Turn, remembered
from headrace.routing.scoring.score import fingerprint
from headrace.routing.success.choosing import Weighed
from headrace.routing.success.heads import Heads
from headrace.routing.tier_view import TierView

PROMPTS = (
    "Hello!",
    "What is the capital of France?",
    "Prove that there are infinitely many primes, step by step.",
    "Write a Python function that merges two sorted lists.",
    "A train leaves at 9:40 and arrives at 12:05. How long does it travel?",
    "If 3 pens cost 4 dollars and 5 pencils cost 3 dollars, how much do 9 pens and 20 pencils cost?",
)
shipped = scorer.load()
other = scorer.LearnedScorer(replace(shipped.model, heads=-shipped.model.heads))


def logged(
    text: str, number: int = 0, *, hints: Hints | None = None, threshold: float = 0.5, **fields: Any
) -> Logged:
    """Return the logged request of a router with the shipped scorer."""
    score = shipped.score(text)
    tiers = [TierView("small", 0.0), TierView("large", threshold)]
    hints = hints or Hints()
    decision = decide(score.value, hints, tiers)
    row = {
        "kind": DECISION,
        "id": str(number),
        "time": float(number),
        "request": f"q{number}",
        "scorer": fingerprint(shipped),
        "tier": decision.tier,
        "outcome": "ok",
        "tokens": {"prompt": 3, "cached": 0, "completion": 5, "wasted": 0},
        "cost": 0.5,
        "seconds": 1.5,
        **of_decision(RoutingRequest(score.value, hints), score, decision),
    }
    record = parse(json.loads(json.dumps({**row, **fields})))
    assert isinstance(record, Logged)
    return record


def log(*, text: bool = False) -> list[Logged]:
    every = [logged(prompt, number) for number, prompt in enumerate(PROMPTS)]
    turns = [[Turn("user", prompt)] for prompt in PROMPTS]
    return [replace(one, turns=own) for one, own in zip(every, turns, strict=True)] if text else every


def tiers_of(replayed: replaying.Replayed) -> list[str]:
    return [replayed.tiers[place] for place in replayed.chosen]


def test_the_same_scorer_and_thresholds_decide_as_logged() -> None:
    replayed = replay(log(), Candidate(shipped, [0.0, 0.5]))

    assert tiers_of(replayed) == [one.choice for one in replayed.requests]
    assert len(set(tiers_of(replayed))) == 2


@pytest.mark.parametrize("text", [False, True])
def test_a_candidate_scores_as_it_would_have_live(text: bool) -> None:
    """From the text, or from the features in the row if these are the ones that it reads."""
    scores = [other.score(prompt).value for prompt in PROMPTS]
    mark = float(np.median(scores))
    replayed = replay(log(text=text), Candidate(other, [0.0, mark]))

    assert replayed.features[:, 1] == pytest.approx(scores, abs=1e-5)
    assert tiers_of(replayed) == ["large" if score >= mark else "small" for score in scores]


def test_requests_that_a_candidate_cannot_score_are_left_out_and_counted() -> None:
    requests = [*log(), logged("Hello!", 9, reads="other features")]
    replayed = replay(requests, Candidate(other, [0.0, 0.5]))

    assert (len(replayed.requests), replayed.unscored) == (len(PROMPTS), 1)
    with pytest.raises(ValueError, match="--decision-log-text"):
        replay([replace(one, reads="other features") for one in log()], Candidate(other, [0.0, 0.5]))


def test_a_score_that_earlier_turns_have_changed_needs_the_text() -> None:
    one = logged("Hello!", features={"kind:open": 1.0, "turn:inherited": 0.5})

    with pytest.raises(ValueError, match="cannot score"):
        replay([one], Candidate(other, [0.0, 0.5]))


def test_hints_and_the_state_of_tiers_hold_for_the_candidate() -> None:
    hard = PROMPTS[2]
    down = logged(hard, 1)
    requests = [
        logged(hard, 0, hints=Hints(max_tier="small")),
        replace(down, tiers=[replace(down.tiers[0], healthy=False), down.tiers[1]]),
        logged(hard, 2, hints=Hints(tier="large")),
        replace(logged(hard, 3, threshold=1.0), hints=Hints(model="some-model")),
        logged(hard, 4, resumes=True, choice="large", chances={"large": 1.0}),
        logged("Hello!", 5, floor="large"),
    ]
    to_small = replay(requests, Candidate(thresholds=[0.0, 1.0]))
    to_large = replay(requests, Candidate(thresholds=[0.0, 0.0]))

    assert tiers_of(to_small) == ["small", "large", "large", "small", "large", "large"]
    assert tiers_of(to_large) == ["small", "large", "large", "small", "large", "large"]


def many(count: int) -> list[Logged]:
    return [logged(PROMPTS[number % len(PROMPTS)] + " And why?" * number, number) for number in range(count)]


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_shares_are_kept_by_moving_thresholds_as_the_router_does(share: float) -> None:
    replayed = replay(many(200), Candidate(other, shares=[share]))

    assert abs(tiers_of(replayed).count("large") / 200 - share) <= 0.05


def test_without_thresholds_the_candidate_gets_the_shares_of_the_log() -> None:
    requests = many(200)
    replayed = replay(requests, Candidate(other))
    share = sum(one.choice == "large" for one in requests) / 200

    assert replayed.shares is not None
    assert list(replayed.shares) == [pytest.approx(share)]
    assert abs(tiers_of(replayed).count("large") / 200 - share) <= 0.05


def test_a_log_of_choices_by_expected_quality_is_decided_by_the_candidates_estimates() -> None:
    """At the costs that the router expected, and with what each request's weight of cost was."""
    weighed = Weighed((0.9, 0.2), (0.1, 0.2), 1.0)
    requests = [replace(one, weighed=weighed) for one in log()]
    heads = Heads(
        ("small", "large"),
        np.zeros((2, len(prompt_features.NAMES) + len(shipped.model.kinds))),
        np.array([-3.0, 3.0]),
        np.zeros((2, len(shipped.model.kinds))),
        (1, 1),
    )
    candidate = scorer.LearnedScorer(replace(shipped.model, tiers=heads))
    replayed = replay(requests, Candidate(candidate))

    assert replayed.weighed == len(requests)
    assert set(tiers_of(replayed)) == {"large"}
    assert replay(requests, Candidate(candidate, [0.0, 1.0])).weighed == 0, "thresholds are of the score"
    assert replay(log(), Candidate(candidate)).weighed == 0, "the log has no expected costs"
    assert replay(requests, Candidate(other)).weighed == 0, "it has no estimates"


def test_the_scorer_of_the_log_chooses_as_logged_between_tiers_that_are_nearly_equal() -> None:
    """The estimates in a row are rounded more than what the tier was chosen by."""
    weighed = Weighed((0.50001, 0.50004), (0.1, 0.1), 1.0)
    rounded = {"small": (0.5, None), "large": (0.5, None)}
    requests = [replace(one, weighed=weighed, estimates=rounded, choice="large") for one in log()]

    assert set(tiers_of(replay(requests, Candidate(shipped)))) == {"large"}


def test_requests_without_a_decision_or_of_other_tiers_are_left_out() -> None:
    none = logged("Hello!", 1, choice="", chances={}, tiers={})
    three = logged("Hello!", 2, tiers={"nano": {"from": 0}, "small": {"from": 0.2}, "large": {"from": 0.5}})
    replayed = replay([none, three, *log()], Candidate(shipped, [0.0, 0.5]))

    assert (len(replayed.requests), replayed.left_out) == (len(PROMPTS), 2)
    with pytest.raises(ValueError, match="no decisions"):
        replay([none], Candidate(shipped))


@pytest.mark.parametrize(
    "candidate",
    [Candidate(thresholds=[0.0, 0.3, 0.5]), Candidate(shares=[0.3, 0.2])],
)
def test_thresholds_and_shares_must_be_as_many_as_the_tiers_need(candidate: Candidate) -> None:
    with pytest.raises(ValueError, match="the tiers of the log need"):
        replay(log(), candidate)


class _Memory:
    """A scorer that scores a turn as its conversation was scored before, and others by their length."""

    model = shipped.model

    def score(self, text: str) -> Any:
        return replace(shipped.score(text), value=min(len(text) / 100, 1.0))

    def score_turns(self, turns: Sequence[Turn], earlier: Any = None) -> Any:
        score = self.score(turns[-1].text)
        if earlier is not None:
            score = replace(score, value=earlier.score)
        return replace(score, carried=None if turns[-1].text == "thanks" else Carried(score.value))


def test_a_candidate_remembers_its_own_scores_of_a_conversation() -> None:
    long, short = "x" * 90, "yes"
    requests = [
        logged(text, number, prompt=text, session=session, scorer="another", answer=f"a{number}")
        for number, (text, session) in enumerate([(long, "a"), (short, "a"), (short, ""), (short, "b")])
    ]
    candidate = Candidate(_Memory(), [0.0, 0.5])  # type: ignore[arg-type] # it scores like one
    late = replace(requests[1], time=2000.0)

    assert tiers_of(replay(requests, candidate)) == ["large", "large", "small", "small"]
    assert tiers_of(replay([requests[0], late], candidate)) == ["large", "small"], "it was idle for too long"
    unanswered = replace(requests[0], answer="")
    assert tiers_of(replay([unanswered, requests[1]], candidate)) == ["large", "small"]


def test_a_candidate_remembers_what_the_router_would_have() -> None:
    """The same question again is recognised by its words, and "thanks" leaves no trace."""
    hard = "Prove step by step that there are infinitely many primes."
    requests = [
        logged(text, number, prompt=text, session="a", scorer="another", answer=f"a{number}")
        for number, text in enumerate([hard, "Thanks!", hard, "yes, go on"])
    ]
    found = replay(requests, Candidate(other, [0.0, 0.5])).features[:, 1].tolist()

    earlier, live = None, []
    for one in requests:
        score = other.score_turns(one.turns or (), earlier)
        earlier = remembered(earlier, score.value, score.carried, "small")
        live.append(score.value)
    assert found == pytest.approx(live)
    assert found[2] != pytest.approx(found[0]), "it is asked again"


def test_thresholds_alone_are_tried_on_requests_of_the_last_scorer() -> None:
    older = [replace(one, scorer="older") for one in log()]
    canary = [replace(one, scorer="candidate", arm="canary") for one in log()]
    replayed = replay([*older, *log(), *canary], Candidate(thresholds=[0.0, 0.5]))

    assert {one.scorer for one in replayed.requests} == {fingerprint(shipped)}
    assert replayed.left_out == len(older) + len(canary)
    assert replay([*older, *log()], Candidate(other, [0.0, 0.5])).left_out == 0


def test_ratings_count_for_the_choice_and_shadow_ratings_for_their_tier() -> None:
    one = replace(logged("Hello!"), choice="small", tier="large", chances={"small": 1.0})
    one.qualities.update({("caller", "large"): 0.25, ("judge", "large"): 0.5, ("judge", "nano"): 0.75})

    assert quality(one, "small", "caller") == 0.25, "the large tier answered in its place"
    assert quality(one, "small", "judge") == 0.5
    assert quality(one, "large", "caller") is None
    assert quality(one, "nano", "judge") == 0.75
    assert quality(one, "nano", "caller") is None


def test_the_arrays_have_the_rows_results_and_chances() -> None:
    requests = log()
    requests[0].qualities["caller", "small"] = 1.0
    arrays = sample(
        replay(requests, Candidate(thresholds=[0.0, 1.0])), lambda one, tier: quality(one, tier, "caller")
    )

    assert arrays.chances.tolist() == [
        [1.0, 0.0] if one.choice == "small" else [0.0, 1.0] for one in requests
    ]
    assert arrays.results[0].tolist()[0] == 1.0
    assert np.isnan(arrays.results[1:]).all()
    assert arrays.candidate.tolist() == [0] * len(requests)
    assert np.isfinite(arrays.features).all()


def test_failures_and_times_are_of_the_chosen_tier() -> None:
    one = replace(logged("Hello!"), choice="small", outcome="failed")

    assert (replaying.failed(one, "small"), replaying.failed(one, "large")) == (1.0, None)
    assert replaying.failed(replace(one, outcome="cancelled"), "small") is None
    assert replaying.seconds(one, "small") is None
    assert replaying.seconds(replace(one, outcome="ok"), "small") == 1.5
    assert replaying.cost(one, "small") == 0.5


def test_requests_of_a_tenant_or_a_conversation_are_one_cluster() -> None:
    conversation = [
        logged("Hi", 0, session="s"),
        logged("Hi", 1, session="s"),
        logged("Hi", 2),
        logged("Hi", 3),
    ]
    tenants = [logged("Hi", number, tenant=str(number % 20), session=str(number)) for number in range(40)]

    assert clusters(conversation).tolist() == [0, 0, 1, 2]
    assert clusters(tenants).tolist() == [*range(20), *range(20)]
