"""Keep a checked model on disk as the kernels read it, so that later starts need no code of transformers.

A first start loads the network, lays out its weights, and compares the results of the kernels with those of
transformers. It then stores the weights and these results in one file. A later start reads the file, computes
the same sequences, and compares the bits. The file is used only if nothing has changed that could change a
bit: the files of the model, the source code of the engine, the versions of the libraries, and the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import mmap
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine.attention_kinds import Layers
from headrace.worker.engine.cpu.decoder import DecoderWeights
from headrace.worker.engine.cpu.kernels.decoder_step import DECODER_LAYER, STEP
from headrace.worker.engine.cpu.kernels.matmul import ElementType
from headrace.worker.engine.kv_memory import LayerShape
from headrace.worker.engine.load.refusals import UnsupportedModel
from headrace.worker.engine.transformers_attention import LayerAttention, Masking

log = logging.getLogger(__name__)

WRITER = "stored-model"  # the name of the thread that writes

_ALIGNMENT = 64
_LEAST_FREE = 4  # a model is stored only if the disk has this many times its size


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model that agreed with transformers.

    context    tokens of the longest sequence that is served
    checked    tokens of the longest sequence of the self-check
    layers     the attention that the layers of its network were observed to need
    eos_ids    ids that end a turn
    warnings   sentences about its files
    logits     results of the kernels for the first case of the self-check
    """

    weights: DecoderWeights
    context: int
    checked: int
    layers: Layers
    eos_ids: frozenset[int]
    warnings: tuple[str, ...]
    logits: torch.Tensor

    @property
    def mapped_bytes(self) -> int:
        """Memory of weights that the system counts as available, because it can read the file again."""
        return sum(owner.nbytes for owner in self.weights.owned if isinstance(owner, np.ndarray))


@dataclasses.dataclass(frozen=True)
class Remembered:
    """The results of an earlier start for a case of the self-check; see `self_check.Expected`."""

    logits: torch.Tensor

    def compare(self, logits: torch.Tensor, first: int, how: str) -> None:
        """Raise UnsupportedModel unless the bits are the same."""
        if not torch.equal(logits, self.logits[first:]):
            raise UnsupportedModel(f"the stored weights, computed {how}, differ from those that were checked")


class ModelStore:
    """The file of one model in one dtype.

    cache      the cache folder
    identity   what distinguishes the model from others; a model that is changed replaces the stored one
    state      everything else that the stored model depends on, beside software and CPU
    """

    def __init__(self, cache: Path, identity: str, state: str) -> None:
        self._path = cache / "laid-out" / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._part = self._path.with_suffix(".part")
        self._key = hashlib.sha256(f"{state} {_software()}".encode()).hexdigest()

    def read(self) -> StoredModel | None:
        """Read the model; None if there is none that can be used."""
        try:
            with self._path.open("rb") as file:
                header = json.loads(file.readline())
                if header["key"] != self._key:
                    return None
                # Workers of the same model share the pages of the file.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # Read all, but map only what is used: most rows of the embedding are not.
            if hasattr(mmap, "MADV_WILLNEED"):
                mapped.madvise(mmap.MADV_WILLNEED)
            self._part.unlink(missing_ok=True)  # of a process that was killed
            return _unpack(header, np.frombuffer(mapped, np.uint8, header["bytes"], header["begin"]))
        except FileNotFoundError:
            return None
        except Exception:
            log.debug("the stored model cannot be read", exc_info=True)
            return None

    def discard(self) -> None:
        """Delete the file."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def write(self, model: StoredModel) -> None:
        """Write the model on a thread of its own: the system may take seconds.

        Does nothing if another process writes it or the disk is too small.
        """
        threading.Thread(target=self._write, args=(model,), name=WRITER, daemon=True).start()

    def _write(self, model: StoredModel) -> None:
        try:
            import fcntl

            self._path.parent.mkdir(parents=True, exist_ok=True)
            header, tensors = _pack(model)
            if shutil.disk_usage(self._path.parent).free < _LEAST_FREE * header["bytes"]:
                return
            with self._part.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)  # what a process that was killed has left
                self._write_to(file, header, tensors)
                self._part.replace(self._path)
        except (ImportError, OSError):
            log.debug("the model is not stored", exc_info=True)

    def _write_to(self, file: Any, header: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        line = json.dumps({"key": self._key, "begin": 0, **header}).encode()
        begin = -(-(len(line) + 20) // _ALIGNMENT) * _ALIGNMENT
        line = json.dumps({"key": self._key, "begin": begin, **header}).encode() + b"\n"
        file.write(line + bytes(begin - len(line)))
        for tensor in tensors:
            data = _bytes_of(tensor)
            file.write(data)
            file.write(bytes(-len(data) % _ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())  # before it is renamed: after a crash the file is whole or does not exist


def state_of_files(folder: Path) -> str:
    """Return a text that changes whenever a file of a model folder does."""
    state = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        status = path.stat()
        state.update(f"{path.name} {status.st_size} {status.st_mtime_ns} {status.st_ino}".encode())
    return state.hexdigest()


def _software() -> str:
    versions = torch.__version__, version("transformers"), numba.__version__, np.__version__
    state = hashlib.sha256(f"{versions} {llvmlite.binding.get_host_cpu_name()}".encode())
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()


def _pack(model: StoredModel) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Return the header of the file, and the tensors that follow it."""
    weights = model.weights
    tensors = [*weights.owned, model.logits]
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    places = {tensor.data_ptr(): offset for tensor, offset in zip(tensors, offsets, strict=True)}
    header = {
        "bytes": size,
        "element_type": int(weights.element_type),
        "vocabulary_size": weights.vocabulary_size,
        "step": _moved(weights.step, places),
        "decoder_layers": _moved(weights.layers, places),
        "layers": {index: dataclasses.asdict(layer) for index, layer in model.layers.items()},
        "eos_ids": sorted(model.eos_ids),
        "warnings": model.warnings,
        "context": model.context,
        "checked": model.checked,
        "logits": (offsets[-1], tuple(model.logits.shape)),
    }
    return header, tensors


def _unpack(header: dict[str, Any], held: npt.NDArray[np.uint8]) -> StoredModel:
    base = held.ctypes.data
    weights = DecoderWeights.from_records(
        ElementType(header["element_type"]),
        vocabulary_size=header["vocabulary_size"],
        step=_placed(header["step"], STEP, base),
        layers=_placed(header["decoder_layers"], DECODER_LAYER, base),
        owned=[held],
    )
    layers = {
        int(index): LayerAttention(LayerShape(**own["shape"]), own["heads"], Masking(**own["masking"]))
        for index, own in header["layers"].items()
    }
    offset, shape = header["logits"]
    return StoredModel(
        weights=weights,
        context=header["context"],
        checked=header["checked"],
        layers=layers,
        eos_ids=frozenset(header["eos_ids"]),
        warnings=tuple(header["warnings"]),
        logits=torch.from_numpy(np.ndarray(shape, np.float32, held, offset).copy()),
    )


def _moved(records: npt.NDArray[Any], places: Mapping[int, int]) -> dict[str, Any]:
    """Return records as JSON: their bytes, and which of their numbers are addresses, as offsets."""
    moved, addresses = records.copy(), []
    for number, place in enumerate(_integers(moved)):
        if int(place[()]) in places:
            place[()] = places[int(place[()])]
            addresses.append(number)
    return {"bytes": moved.tobytes().hex(), "addresses": addresses}


def _placed(stored: dict[str, Any], dtype: np.dtype[Any], base: int) -> npt.NDArray[Any]:
    """Return the records of `_moved`, with addresses from *base* on."""
    records = np.frombuffer(bytearray.fromhex(stored["bytes"]), dtype)
    integers = list(_integers(records))
    for number in stored["addresses"]:
        integers[number][()] += base
    return records


def _integers(records: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Yield all int64 numbers of records, as arrays without dimensions that can be written."""
    for index in range(len(records)):
        yield from _fields(records[index : index + 1])


def _fields(record: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for name in record.dtype.names or ():
        if record[name].dtype.names:
            yield from _fields(record[name])
        elif record[name].dtype == np.int64:
            yield record[name].reshape(())


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().view(torch.uint8).numpy().reshape(-1).data
