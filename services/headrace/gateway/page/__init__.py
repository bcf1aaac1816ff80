"""The chat page: one static file, which calls the same API as any other client."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from headrace.gateway.http.exchange import Exchange

_PAGE = Path(__file__).with_name("index.html").read_bytes()


def _policy(page: bytes) -> str:
    """Return the Content-Security-Policy of a page: its own script and style, and calls of its own server."""

    def hashes(tag: bytes) -> str:
        inside = re.findall(rb"<" + tag + rb">(.*?)</" + tag + rb">", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in inside)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": _policy(_PAGE),
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


async def show(exchange: Exchange) -> None:
    """Answer with the page."""
    await exchange.reply(_PAGE, headers=_HEADERS)
