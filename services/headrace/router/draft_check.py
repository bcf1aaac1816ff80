"""Judge an answer that a small tier has drafted: is it good enough to release, or is a larger tier needed?

The check reads prompt and draft, and the draft's token log-probabilities where the engine gave them. It
looks for what a person would stumble over: arithmetic that does not add up, an answer that breaks off,
refuses, hedges, contradicts or repeats itself, that leaves facts of the question unused, code that does not
parse. It knows nothing of tiers or prices; `policy.py` compares `Check.good` with what a release must be
worth.

The model is a sum of shares in log-odds, so that every verdict can be explained. Its weights are in a JSON
file; the one that Headrace ships was set by hand, not fitted: see `artifacts/README.md`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.router.artifact import BadArtifact
from headrace.router.complexity import Feature, sigmoid
from headrace.router.draft_features import FEATURES, measure

FORMAT = 1  # of the weights' file
SHIPPED = Path(__file__).parent / "artifacts" / "draft_check.json"
_WORTH_SAYING = 0.25  # log-odds; what weighs less is no reason of its own


@dataclass(frozen=True, slots=True)
class Check:
    """The verdict on a draft.

    good      the probability that it is good enough; ln(good / (1 - good)) is bias and log_odds added up
    reasons   what speaks against it, the weightiest first, in words; empty when nothing does
    bias      the log-odds of a draft of which nothing is to be said
    features  what was found, and each finding's share: below 0 speaks for escalation
    """

    good: float
    reasons: tuple[str, ...]
    bias: float
    features: tuple[Feature, ...]


class DraftChecker:
    """Checks drafts: deterministic, and quick enough for every one of them (a millisecond or so)."""

    def __init__(self, bias: float, weights: Mapping[str, float]) -> None:
        """*weights* are log-odds for each of `draft_features.FEATURES` at full strength."""
        self._bias = bias
        self._weights = dict(weights)

    def check(
        self, prompt: str, draft: str, *, finished: bool = True, logprobs: Sequence[float] | None = None
    ) -> Check:
        """Judge *draft* as an answer to *prompt*.

        finished   whether the model ended its turn by itself; False if it was cut short
        logprobs   of the draft's tokens, natural logarithms, at most 0; None if the engine did not say
        """
        values = measure(prompt, draft, finished=finished, logprobs=logprobs)
        features = tuple(
            Feature(name, values[name], values[name] * self._weights[name])
            for name in FEATURES
            if values[name]
        )
        against = sorted(features, key=lambda feature: feature.log_odds)
        reasons = tuple(FEATURES[found.name] for found in against if found.log_odds <= -_WORTH_SAYING)
        good = sigmoid(self._bias + sum(feature.log_odds for feature in features))
        return Check(good, reasons, self._bias, features)


def load(path: Path | None = None) -> DraftChecker:
    """The checker whose weights are at *path*, or the one that Headrace ships. Raises BadArtifact."""
    path = path or SHIPPED
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["kind"] != "draft_check":
            raise BadArtifact(f"{path} is not a draft check of format {FORMAT}")
        weights = {name: float(content["weights"][name]) for name in FEATURES}
        return DraftChecker(float(content["bias"]), weights)
    except OSError as error:
        raise BadArtifact(f"{path} cannot be read: {error.strerror or error}") from error
    except BadArtifact:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise BadArtifact(f"{path} is not a draft check's weights: {error!r}") from error
