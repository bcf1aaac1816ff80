"""The shipped scorer is made from rows by one deterministic fit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.routing.data import Family, families
from benchmarks.routing.train import fit
from headrace.routing.scoring import scorer


def asked(about: str, number: int) -> str:
    return f"In case {number}, what of {about} holds?\nA. one\nB. two\nC. three\nD. four"


@pytest.fixture(scope="module")
def law_gains() -> Family:
    """Questions with choices, of which those about law gain."""
    law = [asked("the court and its statute", number) for number in range(300)]
    other = [asked("the garden and its flowers", number) for number in range(300)]
    weak = np.array([0.0] * 300 + [1.0] * 300)
    return Family(law + other, weak, np.ones(600), [""] * 600)


def test_a_fit_learns_which_prompts_gain(law_gains: Family) -> None:
    model = fit({"mmlu": law_gains})

    gains = model.gains(
        np.array(
            [
                scorer.read(asked(about, 7))
                for about in ("the court and its statute", "the garden and its flowers")
            ]
        )
    )
    assert gains[0] > gains[1] + 0.1


def test_rows_that_may_not_be_shipped_teach_nothing(law_gains: Family) -> None:
    assert (fit({"rb_arc": law_gains, "flask": law_gains}).heads == fit({}).heads).all()


def test_a_fit_is_the_same_every_time(law_gains: Family) -> None:
    first, second = fit({"mmlu": law_gains}), fit({"mmlu": law_gains})

    assert (first.gate == second.gate).all()
    assert (first.heads == second.heads).all()


def test_a_family_left_out_is_still_known_by_its_form(law_gains: Family) -> None:
    model = fit({"mmlu": law_gains}, without=["mmlu"])

    kinds = model.kinds_of(scorer.read(asked("the court", 1)))
    assert model.kinds[int(kinds.argmax())] == "choices"


def test_rows_are_read_by_family(tmp_path: Path) -> None:
    def put(name: str, *rows: dict[str, Any]) -> None:
        path = tmp_path / f"{name}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"id": "a/b/1", "prompt": "Why?"} | row) + "\n" for row in rows)

    pair = {"weak_score": 0.0, "strong_score": 1.0, "group": "law"}
    for name in ("mmlu_dev1500", "rb_arc", "rb_mbpp"):
        put(f"dev/{name}", pair)
    put("train/llmrouter_9models", {"id": "llmrouter/train/4200", "strong_mean": 0.5} | pair)
    put("train/gsm8k_train_steps", {"steps": 4})
    put("train/routerdc_7small", {"group": "mbpp", "small_mean": 0.25})
    put("train/flask_difficulty", {"difficulty": 2, "task": "Koala"})
    put("train/arenahard_prompts", {"cluster": "c"})

    found = families(tmp_path)

    gains = {name: float(family.gains[0]) for name, family in found.items()}
    assert gains == pytest.approx(
        {
            **{"mmlu": 1, "rb_arc": 1, "rb_mbpp": 1, "nine/math": 0.5, "steps": 0.4},
            **{"seven/mbpp": 0.75, "flask": 0.4, "arenahard": 0},
        }
    )
