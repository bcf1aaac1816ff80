"""Requests of the mesh for these tests."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format

from headrace.upstream.api.requests import to_http
from headrace.upstream.api.terms import Api, Terms
from headrace.v1 import generation_pb2 as pb

HELLO = {"role": "user", "content": "Hello"}
WEATHER = {
    "name": "get_weather",
    "parameters": '{"type": "object", "properties": {"city": {"type": "string"}}}',
}
TIME = {"name": "get_time"}


def terms(api: Api = "openai", **fields: Any) -> Terms:
    """Terms of an upstream."""
    return Terms(**{"tier": "large", "model": "gpt", "api": api, "max_tokens": 100, **fields})


def asked(**fields: Any) -> pb.GenerateRequest:
    """A request with the fields of its JSON form; a short conversation if they have no input."""
    if not fields.keys() & {"chat", "prompt", "token_ids"}:
        fields["chat"] = {}
    if "chat" in fields:
        fields["chat"] = {"messages": [HELLO], **fields["chat"]}
    return json_format.ParseDict(fields, pb.GenerateRequest())


def body_of(api: Api = "openai", **fields: Any) -> dict[str, Any]:
    """The body for such a request."""
    return to_http(asked(**fields), terms(api)).body
