"""Memory with bounds: the tensors of a launch, and the shared memory of a program."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests.worker.engine.gpu.ptx.errors import WrongAccess

Addresses = npt.NDArray[np.int64]

SHARED_START = 1024  # of a program's shared memory; the first KiB is the driver's on GPUs of 9.0
_GRANULE = 16  # no access is wider


class Region:
    """Bytes from an address to another.

    data   the bytes from `start`, rounded down to a multiple of 16, to `stop`, rounded up
    """

    def __init__(self, name: str, start: int, stop: int, data: npt.NDArray[np.uint8]) -> None:
        self.name, self.start, self.stop = name, start, stop
        self._base = start - start % _GRANULE
        self._bytes = data
        self._views: dict[np.dtype[Any], npt.NDArray[Any]] = {}

    def places(self, addresses: Addresses, dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], Addresses]:
        """Return the memory as numbers of a type, and which of them are at the addresses."""
        view = self._views.get(dtype)
        if view is None:
            view = self._views[dtype] = self._bytes.view(dtype)
        return view, (addresses - self._base) // dtype.itemsize


class Memory:
    """Some regions. Accesses outside of them, and accesses that are not aligned, raise `WrongAccess`."""

    def __init__(self, regions: list[Region]) -> None:
        self._regions = regions

    def check(self, addresses: Addresses, size: int) -> Region | None:
        """Raise if an access of *size* bytes is not aligned or not inside of a region.

        Returns the region of all accesses, or None if they are in several.
        """
        if np.any(addresses % size):
            wrong = int(addresses[addresses % size != 0][0])
            raise WrongAccess(f"address {wrong:#x} is not a multiple of {size}")
        first, last = addresses.min(), addresses.max() + size
        for region in self._regions:
            if region.start <= first and last <= region.stop:
                return region
        for lane, address in enumerate(addresses.tolist()):
            if not any(region.start <= address and address + size <= region.stop for region in self._regions):
                raise WrongAccess(
                    f"{size} bytes at {address:#x}, of active lane {lane}, are outside of all memory: "
                    + "; ".join(self._distance(region, address) for region in self._regions)
                )
        return None

    @staticmethod
    def _distance(region: Region, address: int) -> str:
        size = region.stop - region.start
        return f"{region.name} has {size} bytes, the access is at {address - region.start}"

    def read(self, addresses: Addresses, dtype: np.dtype[Any], count: int = 1) -> npt.NDArray[Any]:
        """Return [accesses, count] adjacent numbers."""
        size = dtype.itemsize
        region = self.check(addresses, size * count)
        places = addresses[:, None] + np.arange(count) * size
        if region is not None:
            view, indices = region.places(places, dtype)
            return view[indices]
        found = np.empty((len(addresses), count), dtype)
        for part, chosen in self._divided(addresses, size * count):
            view, indices = part.places(places[chosen], dtype)
            found[chosen] = view[indices]
        return found

    def write(self, addresses: Addresses, values: npt.NDArray[Any]) -> None:
        """Write [accesses, count] adjacent numbers."""
        size, count = values.itemsize, values.shape[1]
        region = self.check(addresses, size * count)
        places = addresses[:, None] + np.arange(count) * size
        parts = [(region, slice(None))] if region is not None else self._divided(addresses, size * count)
        for part, chosen in parts:
            view, indices = part.places(places[chosen], values.dtype)
            view[indices] = values[chosen]

    def _divided(self, addresses: Addresses, size: int) -> list[tuple[Region, Any]]:
        """Return which accesses are in which region."""
        left = np.ones(len(addresses), bool)
        found = []
        for region in self._regions:
            own = left & (addresses >= region.start) & (addresses + size <= region.stop)
            left &= ~own
            if own.any():
                found.append((region, own))
        return found


def memory_of(tensors: Mapping[str, torch.Tensor]) -> Memory:
    """Return the memory of the tensors, from their first to their last number, by names of arguments."""
    regions = []
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        numbers = 1 + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        start = tensor.data_ptr()
        stop = start + numbers * tensor.element_size()
        # Whole granules are in the same allocation, or at least on the same page.
        base = start - start % _GRANULE
        raw = (ctypes.c_uint8 * (stop + -stop % _GRANULE - base)).from_address(base)
        regions.append(Region(name, start, stop, np.ctypeslib.as_array(raw)))
    return Memory(regions)


def shared_memory(content: bytes) -> Memory:
    """Return the shared memory of a program."""
    padded = np.frombuffer(content + bytes(-len(content) % _GRANULE), np.uint8).copy()
    return Memory([Region("shared memory", SHARED_START, SHARED_START + len(content), padded)])
