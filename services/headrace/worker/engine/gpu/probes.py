"""Find out what a machine offers to kernels on a GPU, and set how torch uses it.

Each function is a few calls; `load.devices` decides by them, and tests replace them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sysconfig
import warnings
from pathlib import Path

import torch

_CONTEXT_BYTES = 512 << 20  # of a process's CUDA context, libraries and kernels, which torch does not count


def built_cuda() -> str:
    """Return the CUDA version that torch was built for, such as "13.0"; empty for builds without CUDA."""
    return torch.version.cuda or ""


def driver_cuda() -> str:
    """Return the newest CUDA version that the driver supports, such as "12.4"; empty without a driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return ""
    except (OSError, AttributeError):
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def start_error() -> str:
    """Return why torch cannot use CUDA, as torch describes it; empty if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same in other words
            torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return ""


def device_count() -> int:
    """Return the number of visible CUDA devices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `start_error` describes what is wrong
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device, major and minor."""
    return torch.cuda.get_device_capability(device)


def device_name(device: torch.device) -> str:
    """Return the product name of a device."""
    return torch.cuda.get_device_name(device)


def triton_version() -> str:
    """Import Triton, and return its version. Raises what the import raises."""
    import triton

    return str(triton.__version__)


def compiler() -> str:
    """Return the C compiler that Triton uses to build what launches its kernels; empty if there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or ""


def has_python_headers() -> bool:
    """Return whether Python.h is there, which that compiler needs."""
    scheme = sysconfig.get_default_scheme()
    # Debian's own Python installs packages to another place than its headers.
    paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
    return Path(paths["include"], "Python.h").is_file()


def triton_start_error() -> str:
    """Return why Triton cannot build and load what launches its kernels; empty if it can."""
    try:
        from triton.runtime import driver

        # The first access compiles a module of Triton's, which then is in TRITON_CACHE_DIR.
        _ = driver.active
    except Exception as error:  # among them those of the compiler, of files, and failed assertions
        return str(error) or type(error).__name__
    return ""


def round_once() -> None:
    """Use cuBLASLt for matrix products, and keep sums of products in float32 until they are complete."""
    torch.backends.cuda.preferred_blas_library("cublaslt")
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    matmul.allow_fp16_reduced_precision_reduction = (False, False)
    matmul.allow_tf32 = False


def limit_memory(device: torch.device, share: float) -> None:
    """Let torch allocate no more than a share of a device's memory, less what CUDA takes besides."""
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(max(share - _CONTEXT_BYTES / total, 0.0), device)
