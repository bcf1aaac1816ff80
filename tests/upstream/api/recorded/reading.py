"""Read recorded responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def recorded(name: str) -> tuple[int, bytes]:
    """Return the status and the body of a response, such as that in vllm/chat."""
    status, _, body = (_FOLDER / f"{name}.txt").read_bytes().partition(b"\n")
    return int(status), body


def events_of(name: str) -> list[Any]:
    """Return the events of a stream, without [DONE]; the body of a whole response as the only one."""
    _, body = recorded(name)
    if not body.startswith(b"data:"):
        return [json.loads(body)]
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: ")]
    assert lines.pop() == b"[DONE]"
    return [json.loads(line) for line in lines]
