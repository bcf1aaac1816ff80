"""Score prompts with a learned model of what a larger tier gains over a smaller one.

A gate estimates the probability of each kind of prompt (a question with choices, an arithmetic word problem,
code...), and one linear head per kind estimates the gain. Both read the features of `prompt_features.py`
alone. The score's log-odds are the gated sum of the heads, so the contribution of each feature is exact. It
needs only numpy. `fitting.py` fits and refits the models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.routing.artifact import BadArtifact
from headrace.routing.scoring import normal, prompt_features
from headrace.routing.scoring.conversation import Earlier, Turn
from headrace.routing.scoring.score import Objective, Score, sigmoid
from headrace.routing.scoring.turns import reading
from headrace.routing.success import heads
from headrace.routing.success.heads import Heads

Array = NDArray[np.float64]

FORMAT = 1  # of the artifact's file
KIND = "scorer"
_DIGITS = 5  # after the point, of the weights in the file
# The weight of answers that people prefer, against right answers. They differ in open requests only.
OBJECTIVES: dict[Objective, float] = {"correctness": 0.0, "both": 0.5, "preference": 1.0}
SHIPPED = Path(__file__).parents[1] / "artifacts" / "scorer.json"


@dataclass(frozen=True, slots=True)
class Model:
    """The parameters of a scorer, with K kinds of prompt and F features.

    gate         [K, F], weights of the softmax that classifies the kind
    gate_bias    [K]
    heads        [K, F], gain in quality per feature at full strength
    head_bias    [K]
    steepness    log-odds of the score per unit of gain
    centre       the gain at which the score is 0.5
    made         how the model was made, for people
    tiers        the chance of success of each tier; None unless it was fitted to outcomes of tiers
    preferred, preferred_bias   like heads and head_bias, with the gain in people's preference instead of
                                right answers; None if the model has one objective
    """

    kinds: tuple[str, ...]
    gate: Array
    gate_bias: Array
    heads: Array
    head_bias: Array
    steepness: float
    centre: float
    made: str = ""
    tiers: Heads | None = None
    preferred: Array | None = None
    preferred_bias: Array | None = None

    def aimed(self, objective: Objective = "both") -> Model:
        """Return the model for one of the OBJECTIVES; itself if it has only one."""
        if self.preferred is None or self.preferred_bias is None:
            return self
        weight = OBJECTIVES[objective]
        return replace(  # rounded as in the file, so that a model that is saved again stays the same
            self,
            heads=np.round((1 - weight) * self.heads + weight * self.preferred, _DIGITS),
            head_bias=np.round((1 - weight) * self.head_bias + weight * self.preferred_bias, _DIGITS),
            preferred=None,
            preferred_bias=None,
        )

    def kinds_of(self, features: Array) -> Array:
        """Return the probability of each kind, [..., K], for *features* [..., F]."""
        logits = features @ self.gate.T + self.gate_bias
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
        shares: Array = odds / odds.sum(axis=-1, keepdims=True)
        return shares

    def gains(self, features: Array) -> Array:
        """Return the expected gain, [rows], for *features* [rows, F]."""
        each = features @ self.heads.T + self.head_bias
        gains: Array = (self.kinds_of(features) * each).sum(axis=-1)
        return gains


class LearnedScorer:
    """Scores prompts with a `Model`, deterministically and in a fraction of a millisecond."""

    def __init__(self, model: Model) -> None:
        self.model = model.aimed()
        self._kind_odds = self.model.steepness * self.model.head_bias
        self._odds = self.model.steepness * self.model.heads
        self._names = (*(f"kind:{kind}" for kind in model.kinds), *prompt_features.NAMES)

    def score(self, text: str) -> Score:
        """Score the text of a prompt of any length."""
        model = self.model
        features = read(text)
        kinds = model.kinds_of(features)
        log_odds = (*(kinds * self._kind_odds).tolist(), *((kinds @ self._odds) * features).tolist())
        bias = -model.steepness * model.centre
        return Score(
            sigmoid(bias + sum(log_odds)),
            bias,
            self._names,
            (*kinds.tolist(), *features.tolist()),
            log_odds,
            estimates=model.tiers.estimates(features, kinds) if model.tiers is not None else {},
        )

    def score_turns(self, turns: Sequence[Turn], earlier: Earlier | None = None) -> Score:
        """See `Scorer.score_turns`."""
        return reading.score_turns(self.score, turns, earlier)


def read(text: str) -> Array:
    """Return the features [F] of a prompt without its framing."""
    found = prompt_features.measure(normal.question(normal.clip(text)))
    return np.fromiter(found.values(), np.float64, len(found))


def load(path: Path | None = None, objective: Objective = "both") -> LearnedScorer:
    """Load the scorer at *path*, by default the one that Headrace ships. Raises BadArtifact.

    objective   one of OBJECTIVES; without effect on a scorer that was refitted, whose outcomes decide
    """
    path = path or SHIPPED
    try:
        return LearnedScorer(_parse(path.read_text(encoding="utf-8")).aimed(objective))
    except OSError as error:
        raise BadArtifact(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadArtifact(f"{path} is not a scorer of this version of Headrace: {error}") from error


def save(model: Model, path: Path) -> None:
    """Write *model* to *path*, as JSON. Raises OSError."""
    path.write_text(_dump(model), encoding="utf-8")


def _dump(model: Model) -> str:
    def rounded(values: Array) -> list[float]:
        return [round(float(value), _DIGITS) for value in values]

    def preferred(place: int) -> dict[str, Any]:
        if model.preferred is None or model.preferred_bias is None:
            return {}
        head, bias = model.preferred[place], round(float(model.preferred_bias[place]), _DIGITS)
        return {"preferred_head": rounded(head), "preferred_bias": bias}

    content: dict[str, Any] = {
        "format": FORMAT,
        "kind": KIND,
        "made": model.made,
        "steepness": model.steepness,
        "centre": round(model.centre, _DIGITS),
        "features": list(prompt_features.NAMES),
        "kinds": {
            name: {
                "gate": rounded(model.gate[place]),
                "gate_bias": round(float(model.gate_bias[place]), _DIGITS),
                "head": rounded(model.heads[place]),
                "head_bias": round(float(model.head_bias[place]), _DIGITS),
            }
            | preferred(place)
            for place, name in enumerate(model.kinds)
        },
    }
    if model.tiers is not None:
        content["tiers"] = heads.dump(model.tiers)
    return json.dumps(content, indent=1) + "\n"


def _parse(text: str) -> Model:
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("kind") != KIND or content.get("format") != FORMAT:
        raise ValueError(f"it is not a scorer of format {FORMAT}")
    if tuple(content["features"]) != prompt_features.NAMES:
        raise ValueError("it was made for other features; fit it again")
    kinds = content["kinds"]
    tiers = content.get("tiers")

    def stacked(name: str) -> Array:
        return np.array([part[name] for part in kinds.values()], dtype=np.float64)

    both = all("preferred_head" in part for part in kinds.values())
    model = Model(
        kinds=tuple(kinds),
        gate=stacked("gate"),
        gate_bias=stacked("gate_bias"),
        heads=stacked("head"),
        head_bias=stacked("head_bias"),
        steepness=float(content["steepness"]),
        centre=float(content["centre"]),
        made=str(content["made"]),
        tiers=None
        if tiers is None
        else heads.parse(tiers, features=len(prompt_features.NAMES), kinds=len(kinds)),
        preferred=stacked("preferred_head") if both else None,
        preferred_bias=stacked("preferred_bias") if both else None,
    )
    shape = (len(kinds), len(prompt_features.NAMES))
    weights, biases = [model.gate, model.heads], [model.gate_bias, model.head_bias]
    if model.preferred is not None and model.preferred_bias is not None:
        weights.append(model.preferred)
        biases.append(model.preferred_bias)
    if (
        not kinds
        or any(part.shape != shape for part in weights)
        or any(part.shape != shape[:1] for part in biases)
    ):
        raise ValueError(f"its weights do not have the shape {shape[0]} x {shape[1]}")
    rest = np.array([model.steepness, model.centre])
    if not all(np.isfinite(part).all() for part in (*weights, *biases, rest)):
        raise ValueError("its weights are not all finite")
    return model
