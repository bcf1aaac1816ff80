"""Serve metrics to Prometheus if the settings ask for it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

from headrace.runtime.serving.bind_check import bind_error, explain
from headrace.runtime.serving.server import StartFailed
from headrace.runtime.telemetry.prometheus import Text, endpoint
from headrace.runtime.telemetry.setup import resource


@asynccontextmanager
async def scraping(host: str, port: int, service: str, instance: str) -> AsyncGenerator[None, None]:
    """Serve the metrics of this process at http://HOST:PORT/metrics while the block runs.

    port                0: they are not served
    service, instance   as of `setup.telemetry`

    Raises StartFailed if it cannot listen.
    """
    if not port:
        yield
        return
    text = await asyncio.to_thread(text_of, service, instance)
    problem: Exception | None = await asyncio.to_thread(bind_error, host, port)
    async with AsyncExitStack() as stack:
        if problem is None:
            try:
                await stack.enter_async_context(endpoint(host, port, text.current))
            except (OSError, UnicodeError) as error:  # in use since the check
                problem = error
        if problem is not None:
            raise StartFailed(_explained(problem, host, port)) from problem
        yield


def text_of(service: str, instance: str) -> Text:
    """Return the text of the metrics of this process. It takes long: call it on a thread.

    service, instance   as of `setup.telemetry`
    """
    attributes = resource(service, instance).attributes
    # Names of attributes may begin with a digit and contain anything.
    names = {name: re.sub(r"^(?=\d)|[^a-zA-Z0-9_]", "_", name) for name in attributes}
    target = {names[name]: str(value) for name, value in attributes.items()}
    return Text({"service_name": target.pop("service_name")}, target)


def _explained(problem: Exception, host: str, port: int) -> str:
    """Return the bind error as a message, with the names of these settings."""
    message = explain(problem, host, port).replace(" (0 picks a free one)", "")
    return message.replace("--port", "--metrics-port").replace("--host", "--metrics-host")
