"""Answer what OpenAI's API has and this server has not."""

from __future__ import annotations

from headrace.gateway.http.exchange import Exchange
from headrace.gateway.problems import Problem

SERVED = "/v1/chat/completions, /v1/completions, /v1/models"


async def embeddings(exchange: Exchange) -> None:
    """Reject a request for embeddings."""
    raise Problem(
        501,
        "/v1/embeddings is not served: the models of this mesh generate text; use a server for embeddings",
        code="not_served",
    )


async def unknown(exchange: Exchange) -> None:
    """Reject a request for any other path."""
    raise Problem(404, f"there is no such path: this server has {SERVED}", code="unknown_url")
