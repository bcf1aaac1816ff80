"""Read the rows that the scorer is trained and measured on, by family.

DATA is a folder of gzipped JSON Lines: `dev/` has outcomes of a weak and a strong model, `train/` other
training data. Only families whose licence allows it (`SHIPPABLE`) train the committed artifact; the others
only measure.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.routing.scoring import scorer

Array = NDArray[np.float64]

# Families whose rows may train the committed artifact: MIT or Apache-2.0.
SHIPPABLE = ("mmlu", "nine/", "steps", "arenahard")


@dataclass(frozen=True)
class Family:
    """Prompts of one origin, and the outcome of the two models on each, 0 to 1.

    groups   [rows], a finer origin (the subject), or empty strings
    """

    prompts: list[str]
    weak: Array
    strong: Array
    groups: list[str]

    @property
    def features(self) -> Array:
        """The features [rows, F] that the scorer reads."""
        return np.array([_features(prompt) for prompt in self.prompts])

    @property
    def gains(self) -> Array:
        """The gains [rows]: strong minus weak."""
        return self.strong - self.weak

    def only(self, rows: NDArray[np.int64]) -> Family:
        """Return the rows at these places."""
        return Family(
            [self.prompts[row] for row in rows],
            self.weak[rows],
            self.strong[rows],
            [self.groups[row] for row in rows],
        )


@cache
def _features(prompt: str) -> Array:
    return scorer.read(prompt)


def families(folder: Path) -> dict[str, Family]:
    """Return every family in *folder*, by name.

    Some families have a substitute for the outcomes of two models: `steps` has the number of solution steps,
    `seven/` how often seven small models failed, `flask` an annotated difficulty, each from 0 to 1.
    `arenahard` has no label.
    """
    rows: dict[str, list[tuple[str, float, float, str]]] = {}

    def add(family: str, row: dict[str, Any], weak: float, strong: float, group: str = "") -> None:
        rows.setdefault(family, []).append((row["prompt"], weak, strong, group))

    for name in ("mmlu_dev1500", "rb_arc", "rb_mbpp"):
        for row in _read(folder / "dev" / f"{name}.jsonl.gz"):
            add(name.removesuffix("_dev1500"), row, row["weak_score"], row["strong_score"], row["group"])
    for row in _read(folder / "train" / "llmrouter_9models.jsonl.gz"):
        add(f"nine/{_origin(row)}", row, row["weak_score"], row["strong_mean"])
    for row in _read(folder / "train" / "gsm8k_train_steps.jsonl.gz"):
        add("steps", row, 1 - min(row["steps"], 10) / 10, 1.0)
    for row in _read(folder / "train" / "routerdc_7small.jsonl.gz"):
        add(f"seven/{row['group']}", row, row["small_mean"], 1.0)
    for row in _read(folder / "train" / "flask_difficulty.jsonl.gz"):
        add("flask", row, 1 - row["difficulty"] / 5, 1.0, row["task"])
    for row in _read(folder / "train" / "arenahard_prompts.jsonl.gz"):
        add("arenahard", row, 0.0, 0.0, row["cluster"])
    return {
        name: Family(
            [row[0] for row in found],
            np.array([row[1] for row in found]),
            np.array([row[2] for row in found]),
            [row[3] for row in found],
        )
        for name, found in rows.items()
    }


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


# The rows of the nine models are in the order of the benchmarks that they were collected from, in two parts.
_ORDER = {
    "train": (
        *((300, ""), (510, "commongen"), (1027, "natural_questions"), (1525, "trivia"), (2023, "race")),
        *((2448, "gpqa"), (2962, "mbpp"), (3105, "humaneval"), (3617, "gsm8k"), (4117, "commonsense")),
        *((4615, "math"), (5112, "openbook"), (10**9, "arc")),
    ),
    "test": ((150, ""), (206, "natural_questions"), (256, "trivia"), (10**9, "mbpp")),
}


def _origin(row: dict[str, Any]) -> str:
    """Return the benchmark of a row of the nine models; its id is its place in their order."""

    _, part, number = row["id"].split("/")
    origin = next(name for end, name in _ORDER[part] if int(number) < end)
    prompt: str = row["prompt"]
    if origin in ("", "commongen"):
        if prompt.startswith("Q: There are") and "houses" in prompt:
            return "zebra"
        return "commongen" if prompt.count(",") > 6 and "." not in prompt else "gsm8k"
    return origin
