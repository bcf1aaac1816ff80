"""Read a file at the start, and again when it changes; an unusable new content leaves the last one in use.

Kubernetes replaces mounted Secrets and ConfigMaps by a symbolic link, which changes the inode.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MAX_BYTES = 16 << 20


class BadFile(Exception):
    """A file that the settings name is not usable. The message contains none of its values."""


class WatchedFile:
    """A file whose content is passed to *use*, which raises BadFile if it is not usable.

    *use* is called at the start, and later on another thread: a large file takes long to parse.

    Call `load` at the start, and run `watch` as a task afterwards.
    """

    def __init__(self, path: Path, use: Callable[[bytes], None]) -> None:
        self._path = path
        self._use = use
        self._stamp: tuple[int, ...] | None = None

    def load(self) -> None:
        """Read the file. Raises BadFile."""
        self._stamp = stamp_of(self._path)
        self._use(_read(self._path))

    async def watch(self) -> None:
        """Read the file whenever it changes, until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self.refresh()

    async def refresh(self) -> None:
        """Read the file if it has changed."""
        try:
            stamp = await asyncio.to_thread(stamp_of, self._path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            await asyncio.to_thread(lambda: self._use(_read(self._path)))
        except Exception as error:  # of others than BadFile, the text may contain values of the file
            problem = str(error) if isinstance(error, BadFile) else type(error).__name__
            log.error(
                "file not usable, keeping its last content",
                extra={"file": str(self._path), "problem": problem},
            )
        else:
            log.info("file read again", extra={"file": str(self._path)})


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """Return a value that changes with the file; a file that replaces it has another inode. None: no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    # The time of the last change also changes with the permissions, which may have prevented reading.
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadFile(f"it cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise BadFile(f"it is larger than {MAX_BYTES >> 20} MiB")
    return data
