"""List the routes of the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.client import Client
from headrace.gateway import health, page
from headrace.gateway.api import one_tier, unserved
from headrace.gateway.api.chat.completions import ChatCompletions
from headrace.gateway.api.models import Models
from headrace.gateway.api.reading import IGNORED_HEADER
from headrace.gateway.api.text.completions import TextCompletions
from headrace.gateway.api.tokenizers import Tokenizers
from headrace.gateway.health import RouterHealth
from headrace.gateway.http.endpoint import HttpService
from headrace.gateway.http.exchange import Exchange, Handler
from headrace.gateway.http.hosts import Hosts
from headrace.gateway.pace import Pace
from headrace.gateway.problems import Problem
from headrace.runtime.telemetry.prometheus import CONTENT_TYPE, Text

CORS_SECONDS = 600  # for which browsers keep what is allowed
# Headers of responses that scripts of other origins may read, besides the simple ones.
_EXPOSED = (
    *("x-headrace-tier", "x-headrace-model", "x-headrace-score", "x-headrace-request-id", "x-headrace-cost"),
    *(IGNORED_HEADER, "x-request-id", "traceparent", "retry-after", "retry-after-ms"),
)


def api(client: Client, http: HttpService) -> list[Route]:
    """Return the routes of the API, whose handlers call the mesh by *client*."""
    models = Models(client)
    pace = Pace()
    chat = ChatCompletions(client, models, pace)
    text = TextCompletions(client, models, pace)
    tokenizers = Tokenizers(client, models)
    get, post = ("GET",), ("POST",)
    listed: list[tuple[tuple[str, ...], str, Handler]] = [
        (post, "/v1/chat/completions", chat.complete),
        (post, "/v1/completions", text.complete),
        *(
            (methods, prefix + path, handler)
            for prefix in ("", "/v1")
            for methods, path, handler in (
                (post, "/tokenize", tokenizers.tokenize),
                (post, "/detokenize", tokenizers.detokenize),
                (get, "/tokenizer_info", tokenizers.info),
            )
        ),
        (get, "/v1/models", models.list),
        (get, "/v1/models/{name:path}", models.show),
        (post, "/v1/embeddings", unserved.embeddings),
        ((*get, *post, "PUT", "PATCH", "DELETE"), "/v1/{rest:path}", unserved.unknown),
    ]
    return [Route(path, http.endpoint(handler, path, *methods)) for methods, path, handler in listed]


def application(
    client: Client,
    http: HttpService,
    router: RouterHealth,
    text: Text,
    origins: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
) -> ASGIApp:
    """Return the application.

    text      of the metrics of this process
    origins   of web pages whose scripts may call it
    hosts     names that requests may be sent to, besides localhost and addresses; None: any
    """

    async def metrics(exchange: Exchange) -> None:
        data = await asyncio.to_thread(text.current)
        await exchange.reply(data, headers={"content-type": CONTENT_TYPE})

    routes = api(client, http)
    tier_api = Router(routes, default=_not_found, redirect_slashes=False)
    routed: ASGIApp = Router(
        [
            *routes,
            Route(one_tier.PATH, one_tier.OneTier(tier_api)),
            Route("/", http.page(page.show, "/")),
            Route("/health", http.page(router.ready, "/health")),
            Route("/health/live", http.page(health.live, "/health/live")),
            Route("/metrics", http.page(metrics, "/metrics")),
        ],
        default=_not_found,
        redirect_slashes=False,
    )
    if origins:
        routed = CORSMiddleware(
            routed,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=_EXPOSED,
            max_age=CORS_SECONDS,
        )
    return routed if hosts is None else Hosts(routed, hosts)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    await Exchange(scope, send).refuse(
        Problem(404, "there is nothing at this path; the API is under /v1/", code="unknown_path"),
    )
