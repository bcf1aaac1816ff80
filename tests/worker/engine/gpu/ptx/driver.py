"""Let Triton launch kernels on the emulator: a backend that ends with PTX, and a driver that runs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver as active_driver

from headrace.worker.engine.gpu.kernels.tiling import shared_bytes
from tests.worker.engine.gpu.ptx.emulation import Emulated
from tests.worker.engine.gpu.ptx.errors import EmulationError
from tests.worker.engine.gpu.ptx.memory import memory_of

CAPABILITY = int(os.environ.get("HEADRACE_PTX_CAPABILITY", "90"))  # compute capability that is compiled for
SEED = "HEADRACE_PTX_SEED"  # the variable with the seed of all orders; random if it is not set

_TARGET = GPUTarget("cuda", CAPABILITY, 32)


class PtxBackend(CUDABackend):  # type: ignore[misc]
    """Triton's compiler for NVIDIA without its last stage: PTX is what a kernel is loaded from."""

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:
        return f"emulated-{super().hash()}"


class _Launcher:
    """Passes the arguments of a launch to a kernel.

    source   what Triton has compiled, with the types of the arguments
    """

    def __init__(self, source: Any, metadata: Any) -> None:
        self._kinds: dict[str, str] = source.signature

    def __call__(self, x: int, y: int, z: int, stream: int, kernel: Emulated, *rest: Any) -> None:
        arguments = {
            name: value
            for (name, kind), value in zip(self._kinds.items(), rest[-len(self._kinds) :], strict=True)
            if kind != "constexpr"
        }
        names = kernel.kernel.parameters
        # After the arguments come pointers to scratch memory, which our kernels do not use.
        bits = [_bits(value) for value in arguments.values()]
        parameters = dict(zip(names, [*bits, *[0] * (len(names) - len(bits))], strict=True))
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        active: Any = active_driver.active
        active.run(kernel, (x, y, z), parameters, memory_of(tensors))


def _bits(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"a tensor on {value.device}: the emulator computes on the CPU")
        return value.data_ptr()
    if isinstance(value, float):
        return int(np.float32(value).view(np.uint32))
    return int(value)


class PtxDriver(DriverBase):  # type: ignore[misc]
    """Triton's driver of a device that is emulated."""

    launcher_cls = _Launcher

    def __init__(self) -> None:
        super().__init__()
        self.utils = self
        self.seed = os.environ.get(SEED) or str(Random().getrandbits(32))
        self._random = Random(self.seed)

    def run(self, kernel: Emulated, grid: Sequence[int], parameters: dict[str, int], tensors: Any) -> None:
        """Run a launch."""
        try:
            kernel.run(grid, parameters, tensors, self._random)
        except EmulationError as error:
            error.add_note(f"{SEED}={self.seed} repeats the order of programs and warps")
            raise

    def load_binary(
        self, name: str, ptx: bytes, shared: int, device: int
    ) -> tuple[Emulated, Emulated, int, int, int]:
        """Return a kernel as module and function; registers, spills, and most threads of a program."""
        kernel = Emulated(ptx.decode(), shared)
        return kernel, kernel, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": shared_bytes(CAPABILITY), "multiprocessor_count": 132, "warpSize": 32}

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> Any:
        return _TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def install() -> PtxDriver:
    """Let all kernels of this process run on the emulator."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels are interpreted: TRITON_INTERPRET must be 0 before triton is imported")
    backends["nvidia"] = Backend(PtxBackend, PtxDriver)
    made = PtxDriver()
    active_driver.set_active(made)
    return made
