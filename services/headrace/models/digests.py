"""Compute the digests of files, and cache them beside the files until size or time changes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from headrace.models.reports import ALTERNATIVES, ModelUnavailable

_CHUNK = 16 << 20
# In a folder with the tokenizer alone: the fingerprint of the model that it was taken from.
FINGERPRINT_FILE = "tokenizer.fingerprint"
_UNPACKED_FORMAT = "1"  # part of the path of an unpacked folder: a new format does not reuse old ones


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex, from the cache if the file is unchanged."""
    if (digest := cached_digest(path)) is not None:
        return digest
    status = path.stat()
    return _digest_of(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)  # a start needs the digest of a file of gigabytes more than once
def _digest_of(path: Path, size: int, mtime_ns: int) -> str:
    return sha256(path)


def tokenizer_fingerprint(path: Path) -> str:
    """Return 16 hex digits that are equal for equal tokenizers, on every machine.

    They are the start of a SHA-256: of tokenizer.json or tokenizer.model in a folder, of vocab.json and
    merges.txt together, or of a whole .gguf file, which includes its tokenizer. A folder into which the
    tokenizer of a .gguf file was exported states the fingerprint of that file. Raises ModelUnavailable if
    *path* has none of these.
    """
    if path.is_file():
        return file_digest(path)[:16]
    if (stated := path / FINGERPRINT_FILE).is_file():
        fingerprint = stated.read_text(errors="replace").strip()
        if re.fullmatch(r"[0-9a-f]{16}", fingerprint):
            return fingerprint
        raise ModelUnavailable(f"{stated} is damaged: export the tokenizer again")
    for file in (path / "tokenizer.json", path / "tokenizer.model"):
        if file.is_file():
            return sha256(file)[:16]
    parts = [path / "vocab.json", path / "merges.txt"]
    if all(part.is_file() for part in parts):
        return hashlib.sha256("".join(map(sha256, parts)).encode()).hexdigest()[:16]
    raise ModelUnavailable(
        f"{path} has no tokenizer: neither tokenizer.json nor tokenizer.model, nor vocab.json with "
        f"merges.txt; {ALTERNATIVES}"
    )


def unpacked_folder(path: Path, cache: Path) -> Path:
    """Return where the .gguf file *path* is, or would be, as a model folder in the cache.

    `headrace.worker.engine.load.gguf.unpacking` writes it.
    """
    name = path.parent.name if path.name == "model.gguf" else path.stem  # default models are NAME/model.gguf
    return cache / "unpacked" / f"{file_digest(path)[:16]}-{_UNPACKED_FORMAT}" / name


def readable_as_folder(path: Path, cache: Path) -> Path:
    """Return the folder that a .gguf file was unpacked into, for engines that read no such files.

    A folder is returned as it is, and so is a file that was not unpacked.
    """
    return folder if path.is_file() and (folder := unpacked_folder(path, cache)).is_dir() else path


def cache_digest(path: Path, digest: str) -> None:
    """Write a stamp file with the digest, size and modification time of a file."""
    status = path.stat()
    stamp = {"sha256": digest, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    scratch = path.with_name(f"{path.name}.stamp.{os.getpid()}")
    with suppress(OSError):  # with a read-only cache, the next start computes the digest again
        scratch.write_text(json.dumps(stamp))
        os.replace(scratch, _stamp(path))


def cached_digest(path: Path) -> str | None:
    """Return the SHA-256 of the stamp file if size and modification time still match, else None."""
    try:
        stamp: dict[str, Any] = json.loads(_stamp(path).read_text())
        status = path.stat()
        if (stamp["size"], stamp["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
            return str(stamp["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _stamp(path: Path) -> Path:
    return path.with_name(f"{path.name}.stamp")


def sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file in hex.

    advance   called with the bytes read so far
    """
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if advance:
                advance(done)
    return digest.hexdigest()
