"""The sampler computes whatever `check_request` accepts: no accepted value makes finite logits non-finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace import errors
from headrace.v1 import generation_pb2 as pb
from headrace.validation import check_request
from headrace.worker.engine.interface import Row, SamplingParams, Token
from headrace.worker.engine.sampling import Sampler

VOCABULARY = 40
FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
# Any value of the field, and more often the limits of what is accepted.
numbers = st.one_of(
    st.sampled_from(
        [0.0, 1e-45, 1e-39, 1.2e-38, 1e-6, 1e-5, 0.01, 0.1, 0.5, 1.0, 2.0, 9.999, 10.0, -2.0, 3e38]
    ),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.floats(-2, 10, width=32),
)
asked = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(FLOATS, numbers),
        "top_k": st.one_of(st.integers(0, 50), st.just(2**32 - 1)),
        "seed": st.integers(0, 2**64 - 1),
        "min_tokens": st.integers(0, 2),
        "logit_bias": st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100, width=32)),
        "logprobs": st.booleans(),
    },
)
magnitudes = st.sampled_from([0.0, 1e-38, 1.0, 30.0, 1e4, 1e30])


def accepted(fields: dict[str, object]) -> pb.Sampling | None:
    sampling = pb.Sampling(**fields)  # type: ignore[arg-type]
    try:
        check_request(pb.GenerateRequest(prompt="x", sampling=sampling))
    except errors.InvalidSampling:
        return None
    return sampling


def params_of(sampling: pb.Sampling) -> SamplingParams:
    given_ = {
        name: getattr(sampling, name)
        for name in (*FLOATS, "top_k", "min_tokens", "logprobs")
        if sampling.HasField(name)  # type: ignore[arg-type]
    }
    return SamplingParams(seed=sampling.seed, max_tokens=100, logit_bias=dict(sampling.logit_bias), **given_)


@settings(max_examples=300)
@given(fields=asked, magnitude=magnitudes, spread=st.integers(0, 2**32 - 1))
def test_accepted_parameters_are_computed_by_the_real_sampler(
    fields: dict[str, object], magnitude: float, spread: int
) -> None:
    sampling = accepted(fields)
    assume(sampling is not None)
    assert sampling is not None
    logits = torch.rand(1, VOCABULARY, generator=torch.Generator().manual_seed(spread)) * 2 - 1
    ids = [3, 3, 5, 7, 3, 9]
    row = Row([0], 0, len(ids), ids, 3, True, params_of(sampling))

    (token,) = Sampler(frozenset({0})).sample(logits * magnitude, [row])

    assert isinstance(token, Token), token
    assert 0 <= token.id < VOCABULARY
    assert token.logprob is None or math.isfinite(token.logprob)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [1e-45, 1e-39, 3.4e38, math.inf, math.nan])
def test_each_extreme_is_rejected_or_computed(name: str, value: float) -> None:
    sampling = accepted({name: value})
    if sampling is None:
        return
    row = Row([0], 0, 3, [1, 2, 3], 2, True, params_of(sampling))
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 20

    (token,) = Sampler(frozenset({0})).sample(logits, [row])

    assert isinstance(token, Token), token
