"""The four forms of `prompt`, and what is wrong with others."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.gateway.api.text.prompts import MAX_PROMPTS, prompts_of

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**33) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([1, 2], [[1, 2]]),
        ([0], [[0]]),
        ([[1, 2], [2**32 - 1]], [[1, 2], [2**32 - 1]]),
        (["x"] * MAX_PROMPTS, ["x"] * MAX_PROMPTS),
    ],
)
def test_a_prompt_has_four_forms(value: object, prompts: object) -> None:
    assert prompts_of(value) == prompts


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (None, "is null, must be a text"),
        (7, "is a number"),
        ({}, "is an object"),
        (True, "is true"),
        ("", "is empty"),
        ([], "is an empty list"),
        ([""], "[0] is empty"),
        ([[]], "[0] has no token ids"),
        (["a", 1], "[1] is a number, but [0] is a text"),
        (["a", ["b"]], "[1] is a list, but [0] is a text"),
        ([1, "a"], "has a text at 1, where a token id was expected"),
        ([1, True], "has true at 1"),
        ([True], "has true at 0"),
        ([1, 2.0], "has a number at 1"),
        ([[1], [2, None]], "[1] has null at 1"),
        ([1, -1], "has -1 at 1, which is no token id"),
        ([2**32], "has 4294967296 at 0"),
        ([1.5], "[0] is a number, must be a text"),
        ([None], "[0] is null"),
        (["x"] * (MAX_PROMPTS + 1), f"has {MAX_PROMPTS + 1} prompts, must have at most {MAX_PROMPTS}"),
    ],
)
def test_another_value_is_described(value: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        prompts_of(value)

    assert complaint in str(raised.value)


@given(value=_JSON)
def test_no_value_fails_in_another_way(value: object) -> None:
    with suppress(ValueError):
        prompts = prompts_of(value)
        assert prompts
        assert all(prompts)
