"""List the routes of the gateway."""

from __future__ import annotations

from starlette.routing import Route, Router
from starlette.types import ASGIApp

from headrace.client import Client
from headrace.gateway import page
from headrace.gateway.api import unserved
from headrace.gateway.api.chat import ChatCompletions
from headrace.gateway.api.models import Models
from headrace.gateway.http.endpoint import Endpoint


def routes(client: Client) -> ASGIApp:
    """Return the application, which calls the mesh by *client*."""
    models = Models(client)
    chat = ChatCompletions(client, models)
    return Router(
        [
            Route("/", Endpoint(page.show, "GET")),
            Route("/v1/chat/completions", Endpoint(chat.complete, "POST")),
            Route("/v1/models", Endpoint(models.list, "GET")),
            Route("/v1/models/{name:path}", Endpoint(models.show, "GET")),
            Route("/v1/embeddings", Endpoint(unserved.embeddings, "POST")),
            Route("/v1/{rest:path}", Endpoint(unserved.unknown, "GET", "POST", "PUT", "PATCH", "DELETE")),
        ],
        redirect_slashes=False,
    )
