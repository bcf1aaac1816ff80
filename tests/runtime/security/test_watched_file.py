"""A file that is read again when it changes, whatever prevented reading it before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.runtime.security import watched_file
from headrace.runtime.security.watched_file import BadFile, WatchedFile


def loaded(folder: Path, use: Callable[[bytes], None]) -> tuple[Path, WatchedFile]:
    """Return a file that was loaded, whose content is b"old"."""
    path = folder / "file"
    path.write_bytes(b"old")
    file = WatchedFile(path, use)
    file.load()
    return path, file


async def test_a_file_whose_permissions_are_corrected_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[bytes]()
    path, file = loaded(tmp_path, seen.append)
    path.write_bytes(b"newer")
    with monkeypatch.context() as patched:
        patched.setattr(watched_file, "_read", _unreadable)  # tests may run as root, who reads everything
        path.chmod(0o000)
        await file.refresh()
    assert seen == [b"old"]

    refused = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == refused:  # which has the kernel's resolution
        path.chmod(0o600)
    await file.refresh()
    assert seen == [b"old", b"newer"]


async def test_a_changed_file_is_parsed_beside_the_event_loop(tmp_path: Path) -> None:
    threads = list[int]()
    path, file = loaded(tmp_path, lambda data: threads.append(threading.get_ident()))
    path.write_bytes(b"longer")
    await file.refresh()

    assert len(threads) == 2
    assert threads[1] != threading.get_ident()


async def test_a_machine_without_threads_does_not_end_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[bytes]()
    path, file = loaded(tmp_path, seen.append)
    path.write_bytes(b"longer")
    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "to_thread", _no_thread)
        await file.refresh()
    await file.refresh()

    assert seen == [b"old", b"longer"]


def _unreadable(path: Path) -> bytes:
    raise BadFile("it cannot be read: Permission denied")


async def _no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")
