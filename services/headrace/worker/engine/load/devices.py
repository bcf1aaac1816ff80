"""Choose the device that computes a model, and reject a machine on which it could not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from headrace.worker.engine.gpu import probes
from headrace.worker.engine.load.refusals import LoadingError, one_line

# Older GPUs have no bfloat16 and no asynchronous copies to shared memory.
_CAPABILITY = (8, 0)
_TRITON = (3, 6)  # the version that torch 2.11 requires
_USE_CPU = "or use --device cpu"


@dataclass(frozen=True, slots=True)
class Target:
    """What computes a model.

    device   holds weights and KV memory
    gpu      whether the engine and the kernels of GPUs are used: always on CUDA. Tests use them on a CPU too,
             in Triton's interpreter
    """

    device: torch.device
    gpu: bool

    @property
    def kernels(self) -> str:
        """What identifies the kernels: results of different ones may differ."""
        if not self.gpu:
            return f"cpu-{_KERNELS['cpu']}"
        compiled = f"gpu-{_KERNELS['gpu']}-triton-{probes.triton_version()}"
        if self.device.type != "cuda":
            return compiled
        major, minor = probes.capability(self.device)
        return f"{compiled}-sm_{major}{minor}"


@dataclass(frozen=True, slots=True)
class Plan:
    """How the engines of a model are built.

    target        the device, and whether the kernels of GPUs are used
    step_tokens   most tokens of a step
    exact         whether a GPU computes batch-invariant results; a CPU does so anyway
    positions     tokens of the longest sequence that is served or checked
    """

    target: Target
    step_tokens: int
    exact: bool
    positions: int


# Raised by each change of kernels that changes their results.
_KERNELS = {"cpu": 1, "gpu": 1}


def choose_device(device: str) -> Target:
    """Convert the setting to a device that can compute. Raises LoadingError."""
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise LoadingError(f"device {device!r} is not one of cpu, cuda, cuda:N")
    if chosen.type == "cpu":
        return Target(torch.device("cpu"), gpu=False)
    problem = _cuda_problem(chosen.index or 0) or _triton_problem()
    if problem:
        raise LoadingError(f"device {device!r} was requested, but {problem}")
    return Target(torch.device("cuda", chosen.index or 0), gpu=True)


def set_up(target: Target, cache: Path, *, exact: bool, memory_share: float = 1.0) -> None:
    """Prepare this process for computing on a GPU; to be called before anything is computed there.

    cache          folder where Triton keeps compiled kernels, so that the next start is faster
    exact          choose settings of cuBLAS that make its results depend less on the batch, for networks
                   with products that our own kernels do not compute
    memory_share   share of the device's memory that this process may use

    Raises LoadingError if Triton cannot launch kernels.
    """
    if target.device.type != "cuda":
        return
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    if exact:
        # Without workspace, cuBLAS cannot split a sum into parts whose number depends on the batch. The
        # settings are those of vLLM's batch_invariant.py.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
        os.environ["CUBLASLT_WORKSPACE_SIZE"] = "1"
        probes.round_once()
    if memory_share < 1:
        probes.limit_memory(target.device, memory_share)
    # Otherwise the first kernel fails, which looks like a problem of the model.
    if reason := probes.triton_start_error():
        raise LoadingError(
            f"Triton cannot build what launches its kernels: {one_line(RuntimeError(reason))}; it needs a C "
            "compiler that works, libcuda.so.1 (ldconfig -p lists it), and a folder to write to, now "
            f"{os.environ['TRITON_CACHE_DIR']}"
        )


def _cuda_problem(index: int) -> str:
    """Return why the CUDA device of an index cannot be used, and what to do; empty if it can."""
    built = probes.built_cuda()
    if not built:
        return (
            f"torch {torch.__version__} is a build without CUDA; install the CUDA build, which PyPI has for "
            f"Linux, {_USE_CPU}"
        )
    driver = probes.driver_cuda()
    if not driver:
        return (
            "there is no NVIDIA driver; install it, start the container with its GPUs (docker run --gpus "
            f"all), {_USE_CPU}"
        )
    # Within a major version, older drivers run newer builds.
    if _numbers(driver)[0] < _numbers(built)[0]:
        return (
            f"the NVIDIA driver supports CUDA {driver}, and torch {torch.__version__} needs {built}; update "
            f"the driver, install a torch for CUDA {_numbers(driver)[0]}, {_USE_CPU}"
        )
    count = probes.device_count()
    if not count:
        reason = one_line(RuntimeError(probes.start_error() or "none is visible"))
        return (
            f"torch finds no CUDA device: {reason}; see what nvidia-smi shows and what CUDA_VISIBLE_DEVICES "
            f"is set to, {_USE_CPU}"
        )
    if index >= count:
        known = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        return f"torch finds only {known}; choose another device, {_USE_CPU}"
    if reason := probes.start_error():
        return f"CUDA does not start: {one_line(RuntimeError(reason))}; see what nvidia-smi shows, {_USE_CPU}"
    own = torch.device("cuda", index)
    major, minor = found = probes.capability(own)
    if found < _CAPABILITY:
        return (
            f"{probes.device_name(own)} has compute capability {major}.{minor}, and 8.0 is the least that is "
            f"supported (A100, RTX 30, L4 and newer); choose another GPU, {_USE_CPU}"
        )
    return ""


def _triton_problem() -> str:
    """Return why Triton cannot run kernels, and what to do; empty if it can."""
    install = "install one: pip install 'triton>=3.6,<4'"
    try:
        version = probes.triton_version()
    except Exception as error:  # a broken installation can raise anything
        return f"Triton cannot be imported ({one_line(error)}); {install}"
    if _numbers(version)[:2] < _TRITON:
        return f"Triton {version} is older than 3.6; {install}"
    if not probes.compiler():
        return "Triton needs a C compiler to launch kernels; install gcc, or set CC"
    if not probes.has_python_headers():
        return (
            "Triton needs the headers of Python to launch kernels, and Python.h is missing; install them "
            "(python3-dev on Debian and Ubuntu)"
        )
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (3, 6) for "3.6.0a1+git"."""
    numbers = []
    for part in version.split(".")[:2]:
        digits = "".join(character for character in part if character.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)
