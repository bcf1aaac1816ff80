"""Create folders with their contents at once, and those of the cache once for all processes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_MANIFEST = "manifest.json"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return *folder* of the cache, after *make* has filled it if it is missing or incomplete.

    make   see `write_whole`

    Other processes that need the folder wait for the first one. Raises OSError, and what *make* raises.
    """
    if is_complete(folder):
        return folder

    def make_and_seal(made: Path) -> None:
        make(made)
        seal(made)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
            write_whole(folder, make_and_seal)
    return folder


def write_whole(folder: Path, make: Callable[[Path], None]) -> None:
    """Create *folder* with its contents: other processes see all of it, or nothing.

    make   fills the empty folder that it receives, which then becomes *folder*
    """
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unpacking-"))
    try:
        make(made)
        for file in made.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write a manifest with the size of every file, by which `is_complete` checks the folder."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / _MANIFEST).write_text(json.dumps({"sizes": sizes}, indent=1))


def is_complete(folder: Path) -> bool:
    """Return whether the folder exists and every file has its size in the manifest."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed or the process ends
        yield
