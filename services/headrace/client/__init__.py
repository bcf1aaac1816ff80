"""Call a Headrace server: a router, or a batcher with the same API.

    async with connect("127.0.0.1:50051") as client:
        async with aclosing(client.generate(chat("Why is the sky blue?"), timeout=30)) as stream:
            async for response in stream:
                print(response.delta.text, end="")

Closing the stream cancels the call, and every failure is an exception of `headrace.errors`. A request that
the server could not accept is retried, and an answer whose stream was lost is resumed at the next token: the
caller reads one uninterrupted stream.
"""

from headrace.client.calls import LIST_TIERS, Client
from headrace.client.connecting import connect
from headrace.client.requests import chat

__all__ = ["LIST_TIERS", "Client", "chat", "connect"]
