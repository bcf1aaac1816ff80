"""Answer /v1/chat/completions."""

from __future__ import annotations

from contextlib import aclosing

from headrace import client as mesh
from headrace.gateway.http.exchange import Exchange


async def complete(client: mesh.Client, exchange: Exchange) -> None:
    """Answer a request for a chat completion."""
    text = ""
    async with aclosing(client.generate(mesh.chat(exchange.body.decode()), timeout=60)) as responses:
        async for response in responses:
            text += response.delta.text
    await exchange.reply({"text": text})
