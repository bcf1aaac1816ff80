"""A gateway in front of a fake router with tokens of prompts and tokenizers, for the tests of this folder."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from tests.gateway.api.text.text_router import TextEdge, text_edge


@pytest.fixture(scope="session")
async def running_text() -> AsyncGenerator[TextEdge, None]:
    """A gateway in front of a fake router, for all tests of this folder."""
    async with text_edge() as started:
        yield started


@pytest.fixture
async def edge(running_text: TextEdge) -> TextEdge:
    """A gateway whose router answers every request the same way, until the test changes it."""
    await running_text.router.renew(running_text.complete)
    return running_text
