"""Ids of calls are unique in a conversation, and follow from the request."""

from __future__ import annotations

import re

from headrace.batcher.tools.families import Family
from headrace.batcher.tools.ids import CallIds


def test_ids_differ_between_calls_turns_and_seeds_and_are_the_same_again() -> None:
    prompts = [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3] * 5000, [1, 2, 3] * 5001]

    ids = [
        CallIds(seed, prompt, family).id(index)
        for seed in (0, 2**64 - 1)
        for prompt in prompts
        for family in (Family.HERMES, Family.MISTRAL)
        for index in range(100)
    ]

    assert len(set(ids)) == len(ids)
    again = CallIds(2**64 - 1, prompts[-1], Family.MISTRAL)
    assert [again.id(index) for index in reversed(range(100))] == ids[-100:][::-1]


def test_ids_have_the_length_that_models_and_callers_expect() -> None:
    """The templates of Mistral's models reject ids of other lengths."""
    assert re.fullmatch("call_[0-9A-Za-z]{24}", CallIds(1, [1], Family.HERMES).id(0))
    assert re.fullmatch("[0-9A-Za-z]{9}", CallIds(1, [1], Family.MISTRAL).id(0))


def test_an_id_is_known_to_all_batchers() -> None:
    """A constant: batchers of another release resume the same answers."""
    assert CallIds(7, [1, 2, 3], Family.JSON).id(1) == "call_XPU0ELtzw5pWAIg080CDxuj1"
