"""List the routes of the gateway."""

from __future__ import annotations

from functools import partial

from starlette.routing import Route, Router
from starlette.types import ASGIApp

from headrace.client import Client
from headrace.gateway import page
from headrace.gateway.api import chat
from headrace.gateway.http.exchange import Endpoint


def routes(client: Client) -> ASGIApp:
    """Return the application, which calls the mesh by *client*."""
    return Router(
        [
            Route("/", Endpoint(page.show), methods=["GET"]),
            Route(
                "/v1/chat/completions",
                Endpoint(partial(chat.complete, client)),
                methods=["POST"],
            ),
        ]
    )
