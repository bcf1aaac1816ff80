"""List the routes of the gateway."""

from __future__ import annotations

from starlette.routing import Route, Router
from starlette.types import ASGIApp

from headrace.client import Client
from headrace.gateway.api import unserved
from headrace.gateway.api.chat import ChatCompletions
from headrace.gateway.api.models import Models
from headrace.gateway.api.text.completions import TextCompletions
from headrace.gateway.api.tokenizers import Tokenizers
from headrace.gateway.http.exchange import Endpoint


def routes(client: Client) -> ASGIApp:
    """Return the application, which calls the mesh by *client*."""
    models = Models(client)
    chat = ChatCompletions(client, models)
    tokenizers = Tokenizers(client, models)
    return Router(
        [
            Route("/v1/chat/completions", Endpoint(chat.complete), methods=["POST"]),
            Route("/v1/completions", Endpoint(TextCompletions(client, models).complete), methods=["POST"]),
            *(
                route
                for prefix in ("", "/v1")
                for route in (
                    Route(f"{prefix}/tokenize", Endpoint(tokenizers.tokenize), methods=["POST"]),
                    Route(f"{prefix}/detokenize", Endpoint(tokenizers.detokenize), methods=["POST"]),
                    Route(f"{prefix}/tokenizer_info", Endpoint(tokenizers.info), methods=["GET"]),
                )
            ),
            Route("/v1/models", Endpoint(models.list), methods=["GET"]),
            Route("/v1/models/{name:path}", Endpoint(models.show), methods=["GET"]),
            Route("/v1/embeddings", Endpoint(unserved.embeddings), methods=["POST"]),
            Route("/v1/{rest:path}", Endpoint(unserved.unknown)),
        ]
    )
