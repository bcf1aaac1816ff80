"""The seam between the load and what it is sent to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from headrace.cli.bench.prompts import Prompt
    from headrace.cli.bench.records import Record


class Backend(Protocol):
    """Sends requests.

    name     as in vLLM's results: "headrace", "openai-chat" or "openai"
    where    the target or URL, for people
    model    the model that is measured, as far as known
    """

    name: str
    where: str
    model: str

    async def ask(self, prompt: Prompt, record: Record, *, timeout: float) -> None:
        """Send one request and write its answer into *record*, whose `sent` is set. Raises Failed."""

    def text_of(self, record: Record) -> str:
        """Return the text of an answer whose parts were kept."""
