"""Check whether the draft of a smaller tier is good enough to release.

The check reads prompt and draft, and the log-probabilities of the draft's tokens if the engine reports them.
It finds wrong arithmetic, answers that are cut off, refuse, hedge, contradict or repeat themselves, unused
facts of the question, and code that does not parse. It does not depend on tiers or prices: `rules.py`
compares `Check.good` with the configured minimum.

The model is a sum of log-odds, so that every verdict can be explained. The weights are in a JSON file, one
set for each kind of evidence: findings in the text count for less if the model's own certainty is known too.
`artifacts/README.md` describes how the shipped weights were made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.routing.artifact import BadArtifact
from headrace.routing.drafts.features import FEATURES, doubts, measure
from headrace.routing.scoring.score import Feature, sigmoid

FORMAT = 2  # of the weights' file
SHIPPED = Path(__file__).parent.parent / "artifacts" / "draft_check.json"
# The text alone, or with log-probabilities, other answers to compare, or both.
EVIDENCE = ("text", "logprobs", "samples", "logprobs+samples")
_MIN_REASON = 0.1  # log-odds; findings that weigh less are not named as reasons


@dataclass(frozen=True, slots=True)
class Check:
    """The verdict on a draft.

    good      the probability that it is good enough; ln(good / (1 - good)) is bias plus the sum of log_odds
    reasons   the findings against it in words, the largest first
    bias      the log-odds of a draft without findings
    features  the findings; log_odds below 0 favours a larger tier
    """

    good: float
    reasons: tuple[str, ...]
    bias: float
    features: tuple[Feature, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of findings for one kind of evidence.

    bias      log-odds of a draft without findings
    weights   log-odds of each of `features.FEATURES` at full strength
    """

    bias: float
    weights: Mapping[str, float]


class DraftChecker:
    """Checks drafts, deterministically and in about a millisecond each.

    weights   for each kind of `EVIDENCE`
    """

    def __init__(self, weights: Mapping[str, Weights]) -> None:
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
        """Check *draft* as an answer to *prompt*.

        finished   whether the model ended its turn by itself; False if it was cut short
        logprobs   of the draft's tokens, natural logarithms, at most 0; None if the engine does not report
                   them. If one is NaN, all are ignored
        samples    other answers of the same model to the same prompt, sampled at random
        """
        if logprobs is not None and any(math.isnan(value) for value in logprobs):
            logprobs = None
        values = measure(prompt, draft, finished=finished, logprobs=logprobs, samples=samples)
        compared = bool(values["samples_agree"] or values["samples_differ"])
        return self._verdict(
            "+".join(["logprobs"] * bool(logprobs) + ["samples"] * compared) or "text", values
        )

    def check_certainty(self, logprobs: Sequence[float]) -> Check:
        """Check a draft that has a form, to which findings in texts do not apply, by log-probabilities alone.

        logprobs   as of `check`, at least one
        """
        return self._verdict("logprobs", dict.fromkeys(FEATURES, 0.0) | doubts(logprobs))

    def _verdict(self, evidence: str, values: Mapping[str, float]) -> Check:
        """Weigh the findings, for one kind of `EVIDENCE`."""
        bias, weights = self._weights[evidence].bias, self._weights[evidence].weights
        features = tuple(
            Feature(name, values[name], values[name] * weights[name]) for name in FEATURES if values[name]
        )
        against = sorted(features, key=lambda feature: feature.log_odds)
        reasons = tuple(FEATURES[found.name] for found in against if found.log_odds <= -_MIN_REASON)
        good = sigmoid(bias + sum(feature.log_odds for feature in features))
        return Check(good, reasons, bias, features)


def load(path: Path | None = None) -> DraftChecker:
    """Load the weights at *path*, by default those that Headrace ships. Raises BadArtifact."""
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
        raise BadArtifact(f"{path} does not hold weights of a draft check: {error!r}") from error


def read_weights(content: Mapping[str, Any]) -> Weights:
    """Parse one set of weights of a file. Raises ValueError, KeyError or TypeError."""

    weights = Weights(float(content["bias"]), {name: float(content["weights"][name]) for name in FEATURES})
    if not all(map(math.isfinite, [weights.bias, *weights.weights.values()])):
        raise ValueError("its weights are not all finite")
    return weights
