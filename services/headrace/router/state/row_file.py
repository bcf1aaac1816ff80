"""Append rows of JSON to a file of bounded size, which the processes of a router share."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl


class RowFile:
    """A file of rows, one JSON object per line.

    A full file is renamed to PATH.1, which replaces an older one, so the disk usage is at most twice
    *max_bytes*. Only its owner may read it, because it may contain callers' prompts.

    Raises OSError if the file cannot be written.
    """

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        os.close(_open(path))
        self.path = path
        self.max_bytes = max_bytes

    def append(self, rows: bytes) -> None:
        """Write one or more complete rows, at most *max_bytes* in total. It blocks: call it from a thread.

        Raises OSError; none of *rows* is then in the file.
        """
        if len(rows) > self.max_bytes:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        while not self._append(rows):
            pass  # the file was rotated, and an empty one has space

    def _append(self, rows: bytes) -> bool:
        """Write the rows, or rotate the file if it is full; return whether the rows are in the file.

        The file is locked: other processes of the router may write to it and rotate it.
        """
        handle = _open(self.path)
        try:
            _lock(handle)
            if not _is_at(self.path, handle):
                return False  # another process has rotated it
            size = os.fstat(handle).st_size
            if size + len(rows) > self.max_bytes:
                os.replace(self.path, self.path.with_name(self.path.name + ".1"))
                return False
            if os.write(handle, rows) < len(rows):
                # A partial row would also corrupt the next one.
                os.ftruncate(handle, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return True
        finally:
            os.close(handle)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def _lock(handle: int) -> None:
    """Wait until no other process has locked the file, and lock it until it is closed."""
    if sys.platform != "win32":  # where a router has one process
        fcntl.flock(handle, fcntl.LOCK_EX)


def _is_at(path: Path, handle: int) -> bool:
    """Return whether an open file is still the one at *path*."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
