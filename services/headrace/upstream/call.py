"""Represent one request to the upstream, whatever URL answers it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from headrace import errors
from headrace.metrics.requests import operation_of
from headrace.upstream.api.requests import to_http
from headrace.upstream.api.terms import Terms
from headrace.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class Call:
    """A request to the upstream.

    request      of the mesh, with its request_id
    path, body   of HTTP
    """

    request: pb.GenerateRequest
    terms: Terms
    path: str
    body: bytes

    @property
    def operation(self) -> str:
        """The value of gen_ai.operation.name."""
        return operation_of(chat=self.request.HasField("chat"))


def call_for(request: pb.GenerateRequest, terms: Terms) -> Call:
    """Return the call for *request*. Takes milliseconds for megabytes. Raises InvalidRequest."""
    made = to_http(request, terms)
    # Bytes of UTF-8, not escapes: most texts are half as long.
    try:
        body = json.dumps(made.body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # JSON within the request may contain one, as an escape
        raise errors.InvalidRequest(
            "a JSON schema in the request contains half of a surrogate pair, which is not a character"
        ) from None
    return Call(request, terms, made.path, body)
