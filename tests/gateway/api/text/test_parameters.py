"""Each parameter of a text completion does what docs/openai.md says: it is supported, ignored or refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from headrace.gateway.api.text.parameters import TextParameters
from headrace.v1 import generation_pb2 as pb
from tests.gateway.api.test_parameters import IGNORED, PAGE
from tests.gateway.api.text.text_router import TextEdge

ROW = re.compile(r"^\| `(\w+)` \| \w+ \| (\w+) \|", re.MULTILINE)
KINDS: dict[str, str] = dict(ROW.findall(PAGE.split("## Parameters\n")[1].split("\n## ")[0]))

# What each supported parameter changes in the request of the mesh, beside the defaults; None: the response.
SUPPORTED: dict[str, tuple[Any, pb.GenerateRequest | None]] = {
    "best_of": (1, None),
    "echo": (True, None),
    "frequency_penalty": (0.5, pb.GenerateRequest(sampling=pb.Sampling(frequency_penalty=0.5))),
    "guided_choice": (["a"], pb.GenerateRequest(sampling=pb.Sampling(choices=pb.Choices(texts=["a"])))),
    "guided_grammar": ("start: /a/", pb.GenerateRequest(sampling=pb.Sampling(lark="start: /a/"))),
    "guided_json": (
        {"type": "null"},
        pb.GenerateRequest(sampling=pb.Sampling(json_schema='{"type":"null"}')),
    ),
    "guided_regex": ("a+", pb.GenerateRequest(sampling=pb.Sampling(regex="a+"))),
    "ignore_eos": (True, pb.GenerateRequest(sampling=pb.Sampling(ignore_eos=True))),
    "include_stop_str_in_output": (True, None),
    "logit_bias": ({"42": -100}, pb.GenerateRequest(sampling=pb.Sampling(logit_bias={42: -100}))),
    "logprobs": (3, pb.GenerateRequest(sampling=pb.Sampling(top_logprobs=3))),
    "max_tokens": (5, pb.GenerateRequest(sampling=pb.Sampling(max_tokens=5))),
    "min_p": (0.5, pb.GenerateRequest(sampling=pb.Sampling(min_p=0.5))),
    "min_tokens": (3, pb.GenerateRequest(sampling=pb.Sampling(min_tokens=3))),
    "model": ("large", pb.GenerateRequest(routing=pb.Routing(tier="large"))),
    "n": (2, None),
    "presence_penalty": (-0.5, pb.GenerateRequest(sampling=pb.Sampling(presence_penalty=-0.5))),
    "priority": (-2, pb.GenerateRequest(routing=pb.Routing(priority=7))),
    "prompt": ("Ho", pb.GenerateRequest(prompt="Ho")),
    "repetition_penalty": (1.5, pb.GenerateRequest(sampling=pb.Sampling(repetition_penalty=1.5))),
    "request_id": ("mine", pb.GenerateRequest(request_id="cmpl-mine")),
    "response_format": (
        {"type": "json_object"},
        pb.GenerateRequest(sampling=pb.Sampling(json_object=True)),
    ),
    "return_token_ids": (True, pb.GenerateRequest(stream=pb.StreamOptions(include_token_ids=True))),
    "return_tokens_as_token_ids": (True, None),
    "seed": (7, pb.GenerateRequest(sampling=pb.Sampling(seed=7))),
    "stop": ("a", pb.GenerateRequest(sampling=pb.Sampling(stop=["a"]))),
    "stop_token_ids": ([5], pb.GenerateRequest(sampling=pb.Sampling(stop_token_ids=[5]))),
    "stream": (True, None),
    "stream_options": ({"include_usage": True}, None),
    "structured_outputs": ({"regex": "a+"}, pb.GenerateRequest(sampling=pb.Sampling(regex="a+"))),
    "temperature": (0, pb.GenerateRequest(sampling=pb.Sampling(temperature=0))),
    "top_k": (5, pb.GenerateRequest(sampling=pb.Sampling(top_k=5))),
    "top_p": (0.5, pb.GenerateRequest(sampling=pb.Sampling(top_p=0.5))),
    "user": ("ann", pb.GenerateRequest(routing=pb.Routing(tenant="ann"))),
}


def _names(kind: str) -> list[str]:
    return sorted(name for name, other in KINDS.items() if other == kind)


def test_the_table_is_that_of_the_code() -> None:
    """What no class knows is ignored."""
    assert _names("supported") == sorted(TextParameters.model_fields)
    assert _names("refused") == sorted(TextParameters.refused)
    assert {*TextParameters.ignored} <= {*_names("ignored")}


@pytest.mark.parametrize("name", _names("supported"))
async def test_a_supported_parameter_reaches_the_mesh(edge: TextEdge, name: str) -> None:
    value, expected = SUPPORTED[name]
    extra: dict[str, Any] = {"stream": True} if name == "stream_options" else {}
    response = await edge.complete(**{name: value}, **extra)

    assert response.status_code == 200
    assert "x-headrace-ignored" not in response.headers
    if expected is not None:
        asked = pb.GenerateRequest()
        asked.CopyFrom(edge.asked)
        asked.MergeFrom(expected)
        for repeated in ("stop", "stop_token_ids"):  # which are appended
            del getattr(asked.sampling, repeated)[len(getattr(expected.sampling, repeated)) :]
        if expected.sampling.HasField("choices"):
            asked.sampling.choices.CopyFrom(expected.sampling.choices)
        assert asked == edge.asked


@pytest.mark.parametrize("name", [name for name in _names("ignored") if name in IGNORED])
async def test_an_ignored_parameter_is_named_in_a_header(edge: TextEdge, name: str) -> None:
    response = await edge.complete(**{name: IGNORED[name]})

    assert response.status_code == 200
    assert response.headers["x-headrace-ignored"] == name


@pytest.mark.parametrize("name", _names("refused"))
async def test_a_refused_parameter_is_an_error_that_names_it(edge: TextEdge, name: str) -> None:
    response = await edge.complete(**{name: {"type": "other"}})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == name
    assert not edge.router.requests
