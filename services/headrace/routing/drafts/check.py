"""Judge an answer that a small tier has drafted: is it good enough to release, or is a larger tier needed?

The check reads prompt and draft, and the draft's token log-probabilities where the engine gave them. It
looks for what a person would stumble over: arithmetic that does not add up, an answer that breaks off,
refuses, hedges, contradicts or repeats itself, that leaves facts of the question unused, code that does not
parse. It knows nothing of tiers or prices; `policy.py` compares `Check.good` with what a release must be
worth.

The model is a sum of shares in log-odds, so that every verdict can be explained. Its weights are in a JSON
file, a set for each kind of evidence: what form tells counts for less where the model's own certainty is
known, too. How the set that Headrace ships was made is in `artifacts/README.md`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.routing.artifact import BadArtifact
from headrace.routing.drafts.features import FEATURES, measure
from headrace.routing.score import Feature, sigmoid

FORMAT = 2  # of the weights' file
SHIPPED = Path(__file__).parent.parent / "artifacts" / "draft_check.json"
# What there may be beside the text: log-probabilities, other answers that could be compared, or both.
EVIDENCE = ("text", "logprobs", "samples", "logprobs+samples")
_WORTH_SAYING = 0.1  # log-odds; what weighs less is no reason of its own


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


@dataclass(frozen=True, slots=True)
class Weights:
    """What findings weigh, with one kind of evidence.

    bias      log-odds of a draft of which nothing is to be said
    weights   log-odds of each of `draft_features.FEATURES` at full strength
    """

    bias: float
    weights: Mapping[str, float]


class DraftChecker:
    """Checks drafts: deterministic, and quick enough for every one of them (a millisecond or so)."""

    def __init__(self, weights: Mapping[str, Weights]) -> None:
        """*weights* are for each kind of `EVIDENCE`."""
        self._weights = dict(weights)

    def check(
        self,
        prompt: str,
        draft: str,
        *,
        finished: bool = True,
        logprobs: Sequence[float] | None = None,
        samples: Sequence[str] = (),
    ) -> Check:
        """Judge *draft* as an answer to *prompt*.

        finished   whether the model ended its turn by itself; False if it was cut short
        logprobs   of the draft's tokens, natural logarithms, at most 0; None if the engine did not say. If
                   one is no number, none of them counts
        samples    other answers of the same model to the same prompt, drawn at random
        """
        if logprobs is not None and any(math.isnan(value) for value in logprobs):
            logprobs = None
        values = measure(prompt, draft, finished=finished, logprobs=logprobs, samples=samples)
        compared = bool(values["samples_agree"] or values["samples_differ"])
        evidence = "+".join(["logprobs"] * bool(logprobs) + ["samples"] * compared) or "text"
        bias, weights = self._weights[evidence].bias, self._weights[evidence].weights
        features = tuple(
            Feature(name, values[name], values[name] * weights[name]) for name in FEATURES if values[name]
        )
        against = sorted(features, key=lambda feature: feature.log_odds)
        reasons = tuple(FEATURES[found.name] for found in against if found.log_odds <= -_WORTH_SAYING)
        good = sigmoid(bias + sum(feature.log_odds for feature in features))
        return Check(good, reasons, bias, features)


def load(path: Path | None = None) -> DraftChecker:
    """The checker whose weights are at *path*, or the one that Headrace ships. Raises BadArtifact."""
    path = path or SHIPPED
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["kind"] != "draft_check":
            raise BadArtifact(f"{path} is not a draft check of format {FORMAT}")
        return DraftChecker({evidence: read_weights(content["evidence"][evidence]) for evidence in EVIDENCE})
    except OSError as error:
        raise BadArtifact(f"{path} cannot be read: {error.strerror or error}") from error
    except BadArtifact:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise BadArtifact(f"{path} is not a draft check's weights: {error!r}") from error


def read_weights(content: Mapping[str, Any]) -> Weights:
    """One set as it is in a file. Raises ValueError, KeyError or TypeError."""
    weights = Weights(float(content["bias"]), {name: float(content["weights"][name]) for name in FEATURES})
    if not all(map(math.isfinite, [weights.bias, *weights.weights.values()])):
        raise ValueError("its weights are not all finite")
    return weights
