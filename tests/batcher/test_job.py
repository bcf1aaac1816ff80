"""Properties of a job that follow from its request."""

from __future__ import annotations

from typing import Any

import pytest

from tests.batcher.links.test_link import job


@pytest.mark.parametrize(
    ("sampling", "least"),
    [
        ({}, 1),
        ({"min_tokens": 7}, 7),
        ({"min_tokens": 2**32 - 1}, 100),
        ({"ignore_eos": True}, 100),
        ({"ignore_eos": True, "stop": ["."]}, 1),
        ({"ignore_eos": True, "stop_token_ids": [3], "min_tokens": 7}, 7),
        ({"stop": ["."], "min_tokens": 7}, 7),
    ],
)
def test_the_minimum_answer_length_counts_only_tokens_that_no_stop_can_prevent(
    sampling: dict[str, Any], least: int
) -> None:
    one = job()
    for name, value in {"max_tokens": 100, **sampling}.items():
        if isinstance(value, list):
            getattr(one.sampling, name).extend(value)
        else:
            setattr(one.sampling, name, value)

    assert one.min_answer_tokens == least
