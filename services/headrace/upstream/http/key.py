"""Keep the key of the upstream: read from a file, sent as a bearer token, and shown nowhere."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from headrace.bearer import AUTHORIZATION, MAX_TOKEN, is_token
from headrace.runtime.security.watched_file import BadFile, WatchedFile

log = logging.getLogger(__name__)


class ApiKey:
    """The key in a file, which is read again when it changes. Without a file there is no key.

    changed   set when a new key was read; for one reader, which clears it

    Raises BadFile if the file is not usable at the start.
    """

    def __init__(self, path: Path | None) -> None:
        self.changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._key = ""
        self._file = None if path is None else WatchedFile(path, self._use)
        if path is not None and self._file is not None:
            self._file.load()
            _warn_if_others_may_read(path)

    def __repr__(self) -> str:
        return f"ApiKey({'set' if self._key else 'none'})"

    @property
    def value(self) -> str:
        """The key; empty if there is none. Remove it from what an upstream reports."""
        return self._key

    def headers(self) -> Mapping[str, str]:
        """Return the headers of a request."""
        return {AUTHORIZATION: f"Bearer {self._key}"} if self._key else {}

    async def watch(self) -> None:
        """Read the file whenever it changes, until cancelled."""
        self._loop = asyncio.get_running_loop()
        if self._file is not None:
            await self._file.watch()

    def _use(self, data: bytes) -> None:
        key = data.decode("ascii", errors="replace").strip()
        if not is_token(key):
            raise BadFile(
                f"it must have 1 to {MAX_TOKEN} characters, printable ASCII without spaces, in one line"
            )
        self._key = key
        if self._loop is not None:  # on another thread than the event loop's
            self._loop.call_soon_threadsafe(self.changed.set)


def _warn_if_others_may_read(path: Path) -> None:
    if os.stat(path).st_mode & stat.S_IROTH:
        log.warning(
            "every user of this machine may read the file of the key",
            extra={"file": str(path), "advice": f"chmod o-r {path}"},
        )
