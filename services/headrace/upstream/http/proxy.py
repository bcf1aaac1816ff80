"""Find the HTTP proxy of a URL in the environment: http_proxy, https_proxy and no_proxy.

aiohttp can do so as well. But it then also reads ~/.netrc, for each request, and rejects requests with a key
to hosts that the file names.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from headrace.channel import is_local, join


@dataclass(frozen=True)
class Proxy:
    """The proxy of a URL.

    url       without user and password; None: there is no proxy
    headers   that it requires
    """

    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def proxy_for(url: str) -> Proxy:
    """Return the proxy for *url*; none for an address on this machine.

    Raises ValueError for a proxy that is not called over HTTP. The message has no password.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_local(join(host, parts.port or 80)) or proxy_bypass(host):
        return Proxy()
    found = getproxies().get(parts.scheme)
    if not found:
        return Proxy()
    proxy = urlsplit(found if "://" in found else f"http://{found}")
    if proxy.scheme != "http" or not proxy.hostname:
        raise ValueError(f"the proxy in {parts.scheme}_proxy must be http://HOST:PORT")
    headers = {}
    if proxy.username is not None:
        credentials = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(credentials.encode()).decode()}"
    return Proxy(f"http://{join(proxy.hostname, proxy.port or 80)}", headers)
