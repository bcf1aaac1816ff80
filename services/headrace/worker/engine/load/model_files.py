"""Check the files of a model before they are loaded, and report which one is damaged and how.

The errors that transformers and torch raise for damaged files rarely name the file and never suggest a fix.
This module checks the first bytes, the headers, and whether the size agrees with the header. It does not
check the weights themselves.
"""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

from headrace.worker.engine.load.refusals import LoadingError, UnsupportedModel, as_loading_error

_LFS = b"version https://git-lfs.github.com/spec/"
_AGAIN = "download it again"
_MAX_HEADER = 100 << 20  # bytes; the limit of safetensors
_FLOATS = ("F64", "F32", "F16", "BF16")
_ADAPTER = "adapter_config.json"
# A key of config.json by which transformers reads another file of the folder, of any format.
_OTHER_WEIGHTS = "transformers_weights"


def first_bytes(path: Path, size: int) -> bytes:
    """Return the first *size* bytes of a file. Raises LoadingError if the file cannot hold a model."""
    if path.is_dir():
        raise LoadingError(f"{path} is a folder, but a file is expected; {_AGAIN}")
    with as_loading_error(path, _AGAIN), path.open("rb") as file:
        data = file.read(max(size, len(_LFS)))
    if not data:
        raise LoadingError(f"{path} is empty; {_AGAIN}")
    if data.startswith(_LFS):
        raise LoadingError(
            f"{path} is a git-lfs pointer instead of the file; run `git lfs pull` in {path.parent}, or "
            f"{_AGAIN}"
        )
    if data.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise LoadingError(f"{path} is a web page instead of the file; {_AGAIN}")
    return data[:size]


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Read a JSON object; an optional file that is missing reads as empty. Raises LoadingError."""
    if optional and not path.is_file():
        return {}
    first_bytes(path, 1)
    with as_loading_error(path, f"correct it, or {_AGAIN}"):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LoadingError(f"{path} is not JSON: {error}; correct it, or {_AGAIN}") from error
    if not isinstance(value, dict):
        raise LoadingError(f"{path} holds a {type(value).__name__}, but an object is expected; {_AGAIN}")
    return value


def inspect(folder: Path, *, allow_pickle: bool = False) -> None:
    """Check each file with weights in a folder.

    allow_pickle   whether weights may be pickles, such as pytorch_model.bin

    Raises LoadingError for damaged files, and UnsupportedModel for weights that would be misread.
    """
    if (folder / _ADAPTER).exists():
        raise UnsupportedModel(
            f"{folder} holds a LoRA adapter ({_ADAPTER}), which Headrace does not apply; merge it into its "
            "base (peft: merge_and_unload, then save_pretrained), or remove the adapter's files to serve the "
            "base"
        )
    if _OTHER_WEIGHTS in read_json(folder / "config.json", optional=True):
        raise UnsupportedModel(
            f"{folder / 'config.json'} names its own file of weights ({_OTHER_WEIGHTS}), which is not read; "
            "rename the file to model.safetensors and remove the key"
        )
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            _inspect_safetensors(path)
        elif allow_pickle:
            _inspect_pickle(path)
        else:
            raise UnsupportedModel(
                f"{path} is a pickle, a format that can hold code, and is not loaded; convert the model to "
                "safetensors (save_pretrained of transformers does), or set --allow-pickle if you trust the "
                "file"
            )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads. Raises LoadingError if there are none."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).exists():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.exists():
            return _listed_files(index)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    raise LoadingError(
        f"{folder} has no weights: neither model.safetensors nor model.safetensors.index.json; "
        + (
            f"found {', '.join(others[:3])}, but files with such names are not read"
            if others
            else "download them"
        )
    )


def weight_numbers(folder: Path) -> int:
    """Return how many numbers the weights of an inspected folder have; 0 if some are in other files."""
    files = weight_files(folder)
    if any(path.suffix != ".safetensors" for path in files):
        return 0
    total = 0
    for path in files:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def _listed_files(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise LoadingError(f"{index} has no valid weight_map, which maps weights to files; {_AGAIN}")
    paths = [index.parent / name for name in sorted(set(names.values()))]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise LoadingError(
            f"{index.parent} lacks {missing[0]}, which {index.name} lists ({len(missing)} of {len(paths)} "
            f"files are missing); download them"
        )
    return paths


def _inspect_safetensors(path: Path) -> None:
    start = first_bytes(path, 8)
    size = path.stat().st_size
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > _MAX_HEADER:
        raise LoadingError(f"{path} does not begin like a safetensors file; it is damaged: {_AGAIN}")
    if 8 + length > size:
        raise LoadingError(
            f"{path} is truncated: it has {size} bytes, and its header alone needs {8 + length}; {_AGAIN}"
        )
    with path.open("rb") as file:
        file.seek(8)
        text = file.read(length)
    with as_loading_error(path, f"its header is damaged: {_AGAIN}"):
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        kinds = {str(name): (str(entry["dtype"]), len(entry["shape"])) for name, entry in header.items()}
    if not kinds:
        raise LoadingError(f"{path} holds no weights; {_AGAIN}")
    if 8 + length + end != size:
        how = "truncated" if size < 8 + length + end else "damaged"
        raise LoadingError(
            f"{path} is {how}: it has {size} bytes, but its header describes {8 + length + end}; {_AGAIN}"
        )
    for name, (kind, dimensions) in kinds.items():
        # Integers in two dimensions and 8-bit floats are quantised weights, which need scales.
        if kind not in _FLOATS and (kind.startswith("F") or (dimensions > 1 and name.endswith("weight"))):
            raise UnsupportedModel(
                f"{path} holds {name} as {kind}: the weights are already quantised. Use the model's "
                f"original weights (Headrace quantises them with --dtype int8), or a gguf file"
            )


def _inspect_pickle(path: Path) -> None:
    start = first_bytes(path, 4)
    if start[:2] == b"PK":
        if not zipfile.is_zipfile(path):
            raise LoadingError(f"{path} is truncated: the end of the archive is missing; {_AGAIN}")
    elif start[:1] != b"\x80":
        raise LoadingError(f"{path} does not begin like a file of torch.save; it is damaged: {_AGAIN}")
