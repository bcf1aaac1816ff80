"""Call a Headrace server: a router, or a batcher with the same API.

    async with connect("127.0.0.1:50051") as client:
        async with aclosing(client.generate(chat("Why is the sky blue?"), timeout=30)) as stream:
            async for response in stream:
                print(response.delta.text, end="")

`Client.ask` returns a whole answer with its calls of tools, and `Client.parse` one as an instance of a
pydantic model.
Closing the stream cancels the call, and every failure is an exception of `headrace.errors`. A request that
the server could not accept is retried, and an answer whose stream was lost is resumed at the next token: the
caller reads one uninterrupted stream.
"""

from headrace.client.calls import LIST_TIERS, Client
from headrace.client.connecting import connect
from headrace.client.replies import Reply, gather
from headrace.client.requests import chat, tool, tool_result

__all__ = ["LIST_TIERS", "Client", "Reply", "chat", "connect", "gather", "tool", "tool_result"]
