"""Check the URLs of the upstream: each lists its models now and then.

A URL serves if it responds to GET URL/models and accepts the key: also by 404, because some services have no
such list.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from headrace.upstream.http.session import MAX_BODY_BYTES, Broken, Http
from headrace.upstream.urls import UpstreamUrl, Urls

log = logging.getLogger(__name__)

CHECK_TIMEOUT = 10.0  # seconds
DOWN_SECONDS = 1.0  # the longest pause between checks of a URL that does not serve: requests may be waiting
_MAX_CONTEXT = 2**32 - 1


class Prober:
    """Checks URLs.

    model     the name of the model at the upstream
    seconds   between two checks of a URL
    """

    def __init__(self, http: Http, urls: Urls, *, model: str, seconds: float) -> None:
        self._http = http
        self._urls = urls
        self._model = model
        self._seconds = seconds
        self._unlisted: set[str] = set()  # URLs that were reported not to list the model

    async def run(self) -> None:
        """Check all URLs until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for url in self._urls:
                tasks.create_task(self._keep_checking(url))
            tasks.create_task(self._follow_key())

    async def _follow_key(self) -> None:
        """Check all URLs when there is a new key."""
        changed = self._http.key.changed
        while True:
            await changed.wait()
            changed.clear()
            for url in self._urls:
                url.check_now.set()

    async def _keep_checking(self, url: UpstreamUrl) -> None:
        while True:
            url.check_now.clear()
            await self.check(url)
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    min(self._seconds, DOWN_SECONDS) if url.problem else self._seconds
                ):
                    await url.check_now.wait()
                    # Requests that fail one after the other must not become as many checks.
                    await asyncio.sleep(min(self._seconds, DOWN_SECONDS) / 10)

    async def check(self, url: UpstreamUrl) -> None:
        """Check one URL."""
        certain = True
        try:
            async with (
                asyncio.timeout(CHECK_TIMEOUT),
                self._http.request("GET", url.url, "models") as response,
            ):
                problem = self._problem(response.status, response.headers.get("location", ""))
                certain = response.status < 500
                if response.status == 200:
                    self._read_models(url, await response.body(MAX_BODY_BYTES))
        except TimeoutError:
            problem, certain = f"no response to GET /models within {CHECK_TIMEOUT:g} s", False
        except Broken as broken:
            problem, certain = str(broken), not broken.connected
        if url.checked(problem, certain=certain):
            log.info("upstream health changed", extra={"url": url.url, "problem": url.problem})

    def _problem(self, status: int, location: str) -> str:
        """Return what a status says about the URL; empty if it serves."""
        if status in (401, 403):
            given = "rejects the key" if self._http.key.value else "requires a key"
            return f"it {given} (HTTP {status}): check --api-key-file"
        if 300 <= status < 400:
            return f"it redirects{_place(location)} (HTTP {status}), which is not followed: correct --url"
        return f"HTTP {status} for GET /models" if status >= 500 else ""

    def _read_models(self, url: UpstreamUrl, body: bytes) -> None:
        """Read the context length from a list of models, if it has one."""
        try:
            listed = [model for model in json.loads(body)["data"] if isinstance(model, dict)]
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        model = next((model for model in listed if model.get("id") == self._model), None)
        if model is None:
            if listed and url.url not in self._unlisted:
                self._unlisted.add(url.url)
                log.warning(
                    "the upstream does not list the model", extra={"url": url.url, "model": self._model}
                )
            return
        url.context_length = _context_length(model)


def _context_length(model: dict[str, Any]) -> int:
    """Return the context length of an entry: of vLLM, OpenRouter or Groq; 0 if it has none."""
    for name in ("max_model_len", "context_length", "context_window"):
        value = model.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_CONTEXT:
            return value
    return 0


def _place(location: str) -> str:
    try:
        host = urlsplit(location).hostname
    except ValueError:
        return ""
    return f" to {host}" if host else ""
