"""A request that waits for its answer does not hold parameters that it does not need any more."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from tests.gateway.fake_router import Edge
from tests.harness import PATIENCE, eventually

MARK = "only in the bodies of these tests"
UNUSED: dict[str, list[Any]] = {MARK: []}  # a list in it, so that the garbage collector knows the object
HI = {"role": "user", "content": "Hi"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"enum": [UNUSED] * 9}}}
NAMED = {"type": "function", "function": {"name": "weather"}}


def held() -> int:
    """Return how many of the objects are in memory, besides the one that is sent."""
    gc.collect()
    return sum(type(one) is dict and MARK in one and one is not UNUSED for one in gc.get_objects())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat/completions", {"messages": [HI], "metadata": [UNUSED] * 9}),
        ("/chat/completions", {"messages": [{**HI, "mood": [UNUSED] * 9}]}),
        (
            "/chat/completions",
            {"messages": [HI], "tools": [WEATHER], "tool_choice": {**NAMED, "x": [UNUSED] * 9}},
        ),
        ("/chat/completions", {"messages": [HI], "guided_json": {"enum": [UNUSED] * 9}}),
        ("/chat/completions", {"messages": [HI], "chat_template_kwargs": {"a": [UNUSED] * 9}}),
        ("/completions", {"prompt": "Hi", "metadata": [UNUSED] * 9}),
        ("/completions", {"prompt": "Hi", "structured_outputs": {"json": {"enum": [UNUSED] * 9}}}),
    ],
)
async def test_what_is_not_used_is_freed_before_the_answer(
    plain: Edge, path: str, body: dict[str, Any]
) -> None:
    plain.router.gate = asyncio.Event()
    sending = asyncio.create_task(plain.http.post(path, json=body))
    await eventually(lambda: plain.router.active == 1)

    left = held()
    plain.router.gate.set()
    assert (await asyncio.wait_for(sending, PATIENCE)).status_code == 200

    assert left == 0
