"""The form of an answer is checked as far as that needs no grammar: at each hop, with the field."""

from __future__ import annotations

import json

import pytest

from headrace import errors
from headrace.checks.structured import (
    MAX_CHOICE_BYTES,
    MAX_CHOICES,
    MAX_LARK_BYTES,
    MAX_REGEX_BYTES,
    MAX_SCHEMA_BYTES,
)
from headrace.grammars import forms, schemas
from headrace.v1 import generation_pb2 as pb
from headrace.validation import check_sampling


def choices(*texts: str) -> pb.Sampling:
    return pb.Sampling(choices=pb.Choices(texts=texts))


@pytest.mark.parametrize(
    "sampling",
    [
        pb.Sampling(json_schema='{"type": "object"}'),
        pb.Sampling(json_schema=json.dumps({"description": "x" * (MAX_SCHEMA_BYTES - 30)})),
        pb.Sampling(json_object=True),
        pb.Sampling(regex="x" * MAX_REGEX_BYTES),
        pb.Sampling(lark="x" * MAX_LARK_BYTES),
        choices("é" * (MAX_CHOICE_BYTES // 2), "b"),
        choices(*map(str, range(MAX_CHOICES))),
        pb.Sampling(json_object=True, ignore_eos=False, min_tokens=5),
    ],
)
def test_forms_within_the_limits_pass(sampling: pb.Sampling) -> None:
    check_sampling(sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        pb.Sampling(json_schema=""),
        pb.Sampling(json_schema="{"),
        pb.Sampling(json_schema="[]"),
        pb.Sampling(json_schema='{"a": Infinity}'),
        pb.Sampling(json_schema='{"a": ' + "1" * 5000 + "}"),
        pb.Sampling(json_schema='{"a":' * 4000 + "1" + "}" * 4000),
        pb.Sampling(json_schema=" " * (MAX_SCHEMA_BYTES + 1)),
        pb.Sampling(json_object=False),
        pb.Sampling(regex=""),
        pb.Sampling(regex="é" * (MAX_REGEX_BYTES // 2 + 1)),
        pb.Sampling(lark=""),
        pb.Sampling(lark="x" * (MAX_LARK_BYTES + 1)),
        choices(),
        choices(""),
        choices("a", "b", "a"),
        choices("é" * (MAX_CHOICE_BYTES // 2 + 1)),
        choices(*map(str, range(MAX_CHOICES + 1))),
        pb.Sampling(json_object=True, ignore_eos=True),
        pb.Sampling(regex="a", ignore_eos=True),
    ],
)
def test_other_forms_are_rejected_with_the_field(sampling: pb.Sampling) -> None:
    with pytest.raises(errors.InvalidSampling) as caught:
        check_sampling(sampling)

    field = f"sampling.{sampling.WhichOneof('structured')}"
    assert caught.value.field == field
    assert caught.value.message.startswith(field)
    assert len(caught.value.message) < 300


def test_the_limits_are_those_of_the_grammars() -> None:
    """The bare install has no grammars, so both places have them."""
    assert MAX_SCHEMA_BYTES == schemas.MAX_SCHEMA_BYTES
    assert MAX_REGEX_BYTES == forms.MAX_REGEX_BYTES
    assert MAX_LARK_BYTES == forms.MAX_LARK_BYTES
    assert (MAX_CHOICES, MAX_CHOICE_BYTES) == (forms.MAX_CHOICES, forms.MAX_CHOICE_BYTES)
