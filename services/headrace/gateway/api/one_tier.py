"""Serve the API for one tier below /tiers/NAME/, for tools that can set a URL only.

/tiers/small/v1/completions is /v1/completions with the header x-headrace-tier: small. So each tier looks like a
server with one model, whose tokenizer needs no name.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

TIER_HEADER = b"x-headrace-tier"
PATH = "/tiers/{tier}/{rest:path}"


class OneTier:
    """Passes requests on to *app* for the tier in their path. A class, because Starlette wraps functions."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        params = scope["path_params"]
        # Names of tiers may have any characters; a header has bytes, which are read as Latin-1.
        tier = params["tier"].encode("latin-1", "replace")
        headers = [pair for pair in scope["headers"] if pair[0] != TIER_HEADER]
        path = "/" + params["rest"]
        inner = {**scope, "path": path, "headers": [*headers, (TIER_HEADER, tier)]}
        await self._app(inner, receive, send)
