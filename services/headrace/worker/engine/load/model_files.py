"""Find out which file of a model is damaged, and how, by opening each of them.

What transformers and torch raise about such files seldom names the file, and never says what to do. Here the
files are looked at before they are loaded: their first bytes, their headers, and whether they are as long as
these say. The numbers inside are not looked at.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel

log = logging.getLogger(__name__)

_LFS = b"version https://git-lfs.github.com/spec/"
_AGAIN = "download it again"
_MOST_HEADER = 100 << 20  # bytes; what safetensors itself accepts
_FLOATS = ("F64", "F32", "F16", "BF16")
_ADAPTER = "adapter_config.json"
_CHARACTERS = 400  # of an error's text that a message shows


@contextmanager
def explained(subject: Path | str, advice: str) -> Iterator[None]:
    """Turn whatever the block raises into a LoadingError of one line: what, why, and what to do.

    The traceback goes to the log at level DEBUG.
    """
    try:
        yield
    except LoadingError:
        raise
    except PermissionError as error:
        raise LoadingError(
            f"cannot read {error.filename or subject}: permission denied; let the user of this process read "
            "it"
        ) from error
    except Exception as error:
        log.debug("loading failed", exc_info=True)
        raise LoadingError(f"{subject}: {brief(error)}; {advice}") from error


def brief(error: BaseException) -> str:
    """Return an error's message on one line, at most _CHARACTERS long."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "..."


def beginning(path: Path, size: int) -> bytes:
    """Return the first *size* bytes of a file. Raises LoadingError for one that holds no model at all."""
    if path.is_dir():
        raise LoadingError(f"{path} is a folder where a file is expected; {_AGAIN}")
    with explained(path, _AGAIN), path.open("rb") as file:
        begin = file.read(max(size, len(_LFS)))
    if not begin:
        raise LoadingError(f"{path} is empty; {_AGAIN}")
    if begin.startswith(_LFS):
        raise LoadingError(
            f"{path} is a git-lfs pointer and not the file itself; run `git lfs pull` in {path.parent}, or "
            f"{_AGAIN}"
        )
    if begin.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise LoadingError(f"{path} is a web page and not the file itself; {_AGAIN}")
    return begin[:size]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises LoadingError."""
    beginning(path, 1)
    with explained(path, f"correct it, or {_AGAIN}"):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LoadingError(f"{path} is not JSON: {error}; correct it, or {_AGAIN}") from error
    if not isinstance(value, dict):
        raise LoadingError(f"{path} holds a {type(value).__name__} where an object is expected; {_AGAIN}")
    return value


def inspect(folder: Path) -> None:
    """Open each file that holds a folder's weights, and refuse what is damaged or not supported.

    Raises LoadingError, or UnsupportedModel for weights that would be read as something else than they are.
    """
    if (folder / _ADAPTER).exists():
        raise UnsupportedModel(
            f"{folder} holds a LoRA adapter ({_ADAPTER}), which Headrace does not apply; merge it into its "
            "base "
            "(peft: merge_and_unload, then save_pretrained), or move the adapter's files away to serve the "
            "base"
        )
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            _inspect_safetensors(path)
        else:
            _inspect_pickle(path)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would read. Raises LoadingError if there are none."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).exists():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.exists():
            return _parts(index)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    raise LoadingError(
        f"{folder} has no weights: neither model.safetensors nor model.safetensors.index.json; "
        + (
            f"found {', '.join(others[:3])}, which are not read under such a name"
            if others
            else "download them"
        )
    )


def _parts(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise LoadingError(f"{index} does not say which file holds which weight (weight_map); {_AGAIN}")
    paths = [index.parent / name for name in sorted(set(names.values()))]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise LoadingError(
            f"{index.parent} lacks {missing[0]}, which {index.name} names ({len(missing)} of {len(paths)} "
            f"files are missing); download them"
        )
    return paths


def _inspect_safetensors(path: Path) -> None:
    begin = beginning(path, 8)
    size = path.stat().st_size
    length = int.from_bytes(begin, "little")
    if len(begin) < 8 or length > _MOST_HEADER:
        raise LoadingError(f"{path} does not begin as a safetensors file does; it is damaged: {_AGAIN}")
    if 8 + length > size:
        raise LoadingError(
            f"{path} is cut off: {size} bytes, and its header alone has {8 + length}; {_AGAIN}"
        )
    with path.open("rb") as file:
        file.seek(8)
        text = file.read(length)
    with explained(path, f"its header is damaged: {_AGAIN}"):
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        kinds = {str(name): (str(entry["dtype"]), len(entry["shape"])) for name, entry in header.items()}
    if not kinds:
        raise LoadingError(f"{path} holds no weights; {_AGAIN}")
    if 8 + length + end != size:
        how = "cut off" if size < 8 + length + end else "damaged"
        raise LoadingError(f"{path} is {how}: {size} bytes, and its header says {8 + length + end}; {_AGAIN}")
    for name, (kind, dimensions) in kinds.items():
        # Whole numbers in two dimensions or eight bits that float: somebody's quantisation, and its scales.
        if kind not in _FLOATS and (kind.startswith("F") or (dimensions > 1 and name.endswith("weight"))):
            raise UnsupportedModel(
                f"{path} holds {name} as {kind}: weights that are quantised already. Use the model's "
                f"original weights (Headrace quantises them itself: --dtype int8), or a gguf file"
            )


def _inspect_pickle(path: Path) -> None:
    begin = beginning(path, 4)
    if begin[:2] == b"PK":
        if not zipfile.is_zipfile(path):
            raise LoadingError(f"{path} is cut off: the end of the archive is missing; {_AGAIN}")
    elif begin[:1] != b"\x80":
        raise LoadingError(f"{path} does not begin as a file of torch.save does; it is damaged: {_AGAIN}")
