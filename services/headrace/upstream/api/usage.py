"""Read the numbers of tokens that an upstream reports."""

from __future__ import annotations

from typing import Any

from headrace.v1 import generation_pb2 as pb

MAX_COUNT = 2**31 - 1


def usage_of(value: object) -> pb.Usage | None:
    """Return the usage in an event; None if there is none, or one that is not plausible."""
    if not isinstance(value, dict):
        return None
    prompt, completion = _count(value, "prompt_tokens"), _count(value, "completion_tokens")
    if prompt is None or completion is None:
        return None
    details = value.get("prompt_tokens_details")
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else None
    return pb.Usage(
        prompt_tokens=prompt, completion_tokens=completion, cached_tokens=min(cached or 0, prompt)
    )


def _count(value: dict[str, Any], name: str) -> int | None:
    count = value.get(name)
    return count if type(count) is int and 0 <= count <= MAX_COUNT else None
