"""Send HTTP requests to the upstream, with its key, and read the responses within bounds.

A failure of the transport becomes `Broken`. What the responses mean is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager

import aiohttp

from headrace.upstream.http.key import ApiKey
from headrace.upstream.http.proxy import Proxy

# Servers close idle connections, uvicorn after five seconds. aiohttp notices, unless it sends a request at
# that moment: the request is then sent again, as after other failures.
IDLE_SECONDS = 60.0
MAX_ERROR_BYTES = 1 << 16
MAX_BODY_BYTES = 4 << 20
_AGENT = "headrace"


class Broken(Exception):
    """The connection failed, or what arrived is no HTTP. The message contains nothing of what was sent.

    connected   whether there was a connection
    """

    def __init__(self, message: str, *, connected: bool = True) -> None:
        super().__init__(message)
        self.connected = connected


class Response:
    """A response whose headers have arrived."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    @property
    def status(self) -> int:
        """The status of HTTP."""
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        """Its headers; the case of names is ignored."""
        return self._response.headers

    @property
    def content_type(self) -> str:
        """The media type, without parameters, in lower case; empty if there is none."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def complete(self) -> bool:
        """Whether the whole body has arrived and was read."""
        return self._response.content.at_eof()

    async def piece(self) -> bytes:
        """Return what has arrived of the body, after waiting for something; empty at the end.

        May be cancelled and called again. Raises Broken.
        """
        with _broken():
            return await self._response.content.readany()

    async def body(self, most: int) -> bytes:
        """Return the body; of a longer one, *most* bytes and a few more. Raises Broken."""
        parts: list[bytes] = []
        size = 0
        while size <= most and (piece := await self.piece()):
            parts.append(piece)
            size += len(piece)
        return b"".join(parts)


class Http:
    """The connections to the URLs of an upstream."""

    def __init__(self, session: aiohttp.ClientSession, key: ApiKey, proxies: Mapping[str, Proxy]) -> None:
        self.key = key
        self._session = session
        self._proxies = proxies

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Response, None]:
        """Send a request, and hold its response while the block runs.

        url    the base URL
        path   to append to it

        If the block is left before the end of the body, the connection is closed at once, so that the
        upstream notices. Only the time to connect is limited here.

        Raises Broken if no response arrives.
        """
        proxy = self._proxies[url]
        # Nothing is compressed: that would delay and combine events.
        sent = {
            "accept": "text/event-stream, application/json",
            "accept-encoding": "identity",
            "content-type": "application/json",
            **self.key.headers(),
            # A proxy reads these in a request for http, and in CONNECT for https.
            **(proxy.headers if url.startswith("http://") else {}),
            **(headers or {}),
        }
        with _broken():
            response = await self._session.request(
                method,
                f"{url}/{path}",
                data=None if body is None else io.BytesIO(body),  # sent in parts: it may be megabytes
                headers=sent,
                # A redirect would send the key to another server, and a POST as a GET.
                allow_redirects=False,
                proxy=proxy.url,
                proxy_headers=proxy.headers or None,
            )
        received = Response(response)
        try:
            yield received
        finally:
            if received.complete:
                response.release()
            else:
                response.close()


@asynccontextmanager
async def http(
    proxies: Mapping[str, Proxy], key: ApiKey, connect_seconds: float
) -> AsyncGenerator[Http, None]:
    """Open the connections to base URLs, each by its proxy, while the block runs.

    Certificates of https are verified, by the authorities of the system or of SSL_CERT_FILE.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, connect=connect_seconds),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"user-agent": _AGENT},
        trust_env=False,  # see `proxy`
    ) as session:
        yield Http(session, key, proxies)


@contextmanager
def _broken() -> Generator[None, None, None]:
    """Convert the errors of aiohttp. Their own texts may quote what was sent and received."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError:
        raise Broken("no connection in time", connected=False) from None
    except aiohttp.ClientConnectorCertificateError:
        raise Broken("its certificate is not valid for its name, or not trusted", connected=False) from None
    except aiohttp.ClientSSLError:
        raise Broken("TLS cannot be established", connected=False) from None
    except aiohttp.ClientConnectorDNSError:
        raise Broken("its name cannot be resolved", connected=False) from None
    except aiohttp.ClientProxyConnectionError:
        raise Broken("the proxy cannot be reached", connected=False) from None
    except aiohttp.ClientHttpProxyError as error:
        raise Broken(f"the proxy answered {error.status}", connected=False) from None
    except aiohttp.ClientConnectorError as error:
        raise Broken(_cause(error.os_error), connected=False) from None
    except aiohttp.ServerDisconnectedError:
        raise Broken("it closed the connection without a response") from None
    except aiohttp.ClientPayloadError:
        raise Broken("it closed the connection within the response") from None
    except aiohttp.ClientOSError as error:
        raise Broken(_cause(error)) from None
    except aiohttp.ClientError:
        raise Broken("its response is not valid HTTP, or its headers are too long") from None
    except OSError as error:
        raise Broken(_cause(error)) from None


def _cause(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno and error.errno > 0 else "the connection failed"


async def within(seconds: float, response: Response) -> None:
    """Read and discard the rest of a body for *seconds* at most, so that its connection can be used again."""
    try:
        async with asyncio.timeout(seconds):
            while not response.complete:
                await response.piece()
    except (TimeoutError, Broken):
        return
