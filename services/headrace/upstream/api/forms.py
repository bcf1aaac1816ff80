"""Translate the form of an answer to the parameters of an upstream.

A form is a promise: an answer that ends with STOP has it. So a form that the upstream would only try to
follow is rejected. OpenAI's API enforces schemas of a subset of JSON Schema, its strict mode; vLLM and
llama.cpp enforce any that they accept.
"""

from __future__ import annotations

import re
from typing import Any

from headrace.checks.structured import read_schema
from headrace.upstream.api.strict import strict_schema
from headrace.upstream.api.terms import Terms, lacks, unsupported
from headrace.v1 import generation_pb2 as pb

_NAME = "answer"  # of the schema, which the API requires


def form_body(sampling: pb.Sampling, terms: Terms, *, chat: bool, tools: bool) -> dict[str, Any]:
    """Return the parameters for the form of the answer, which the request has.

    chat    whether they are for a conversation
    tools   whether the model may call tools

    Raises InvalidSampling for a form that the upstream does not enforce.
    """
    field = f"sampling.{sampling.WhichOneof('structured')}"
    if terms.api == "llama.cpp":
        return _for_llama_cpp(sampling, field, tools)
    if terms.api == "openai" and not chat:
        raise lacks(field, "is set, but the service behind this tier has no forms for raw prompts")
    match field:
        case "sampling.json_schema":
            given = read_schema(sampling.json_schema)
            schema = strict_schema(given) if terms.api == "openai" else given
            if schema is None:
                raise lacks(
                    field,
                    "has keywords or optional properties that the service behind this tier does not enforce",
                )
            inner = {"name": _NAME, "schema": schema, "strict": True}
            return {"response_format": {"type": "json_schema", "json_schema": inner}}
        case "sampling.json_object":
            return {"response_format": {"type": "json_object"}}
    if terms.api == "openai":
        raise unsupported(field)
    match field:
        # `structured_outputs` is for vLLM and Headrace's gateway, `regex` for SGLang; each ignores the other.
        case "sampling.regex":
            return {"structured_outputs": {"regex": sampling.regex}, "regex": sampling.regex}
        case "sampling.choices":
            texts = list(sampling.choices.texts)
            return {
                "structured_outputs": {"choice": texts},
                "regex": f"({'|'.join(map(re.escape, texts))})",
            }
        case _:
            return {"structured_outputs": {"grammar": sampling.lark}}


def _for_llama_cpp(sampling: pb.Sampling, field: str, tools: bool) -> dict[str, Any]:
    match field:
        case "sampling.json_schema":
            return {"json_schema": read_schema(sampling.json_schema)}
        case "sampling.json_object":
            return {"json_schema": {"type": "object"}}
        case "sampling.choices" if not tools:  # it has no grammars together with tools
            return {"grammar": f"root ::= {' | '.join(map(_literal, sampling.choices.texts))}"}
    raise unsupported(field)


def _literal(text: str) -> str:
    """Return *text* as a terminal of llama.cpp's grammars."""
    return f'"{text.translate(_ESCAPES)}"'


_ESCAPES = {code: f"\\x{code:02X}" for code in (*range(0x20), 0x22, 0x5C, 0x7F)}
