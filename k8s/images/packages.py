"""Install a service and its packages for an image: `python packages.py LOCK WHEEL SERVICE [options of pip]`.

Packages go to /opt/headrace/packages and Headrace to /opt/headrace/app, which are on PYTHONPATH. Then this
removes what services do not read at run time, and compiles the modules that the service imports at its
start, those of the standard library too, to /opt/headrace/bytecode, which is PYTHONPYCACHEPREFIX. The
bytecode is valid whatever the times of the files are.
"""

from __future__ import annotations

import compileall
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES, APP, BYTECODE = (Path("/opt/headrace", name) for name in ("packages", "app", "bytecode"))
# Patterns of files and folders without which packages work: tests, sources and headers for compilers.
_UNUSED = (
    "bin",
    "*/tests",
    "numpy/*/tests",
    "numpy/_core/include",
    "numpy/_core/_simd*.so",
    "numpy/f2py",
    "numba/cuda",
    "sympy/*/tests",
    "sympy/*/*/tests",
    "torch/test",
    "torch/bin/[!t]*",  # torch_shm_manager stays: torch looks for it when it is imported
    "torch/bin/test*",
    "torch/include",
    "torch/share",
)
_UNUSED_KINDS = (".a", ".c", ".cpp", ".h", ".hpp", ".pxd", ".pxi", ".pyi", ".pyx")
_STARTS = {
    "gateway": ("headrace.gateway.__main__", "uvloop", "uvicorn.protocols.http.httptools_impl"),
    "router": ("headrace.router.__main__", "uvloop"),
    "batcher": ("headrace.batcher.__main__", "uvloop", "tokenizers", "jinja2.sandbox"),
    "upstream": ("headrace.upstream.__main__", "uvloop"),
    "worker": ("headrace.worker.__main__", "uvloop", "headrace.worker.engine.load.loading"),
    # Each start reads the network with transformers: that of a CPU does only the first time.
    "worker-gpu": (
        *("headrace.worker.__main__", "uvloop", "headrace.worker.engine.load.loading"),
        *("headrace.worker.engine.load.model_config", "headrace.worker.engine.load.network"),
        *("headrace.worker.engine.gpu.engine", "headrace.worker.engine.gpu.decoder"),
        *("headrace.worker.engine.gpu.network_forward", "transformers.models.llama.modeling_llama"),
    ),
}


def main(lock: str, wheel: str, service: str, *options: str) -> None:
    """Install, remove, compile."""
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", *options]
    hashed = ["--require-hashes", "--only-binary=:all:", "--requirement", lock]
    subprocess.run([*install, "--target", str(PACKAGES), *hashed], check=True)
    subprocess.run([*install, "--target", str(APP), "--no-index", wheel], check=True)
    for path in _unused():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for library in _with_symbols():
        subprocess.run(["strip", "--strip-debug", library], check=True)
    _compile(_STARTS[service])


def _unused() -> Iterator[Path]:
    for pattern in _UNUSED:
        yield from sorted(PACKAGES.glob(pattern))
    shutil.rmtree(APP / "bin", ignore_errors=True)
    for path in sorted([*PACKAGES.rglob("*"), *APP.rglob("*")]):
        # Triton compiles the sources and headers that it has.
        if path.suffix in _UNUSED_KINDS and path.is_file() and "triton" not in path.parts:
            yield path


def _with_symbols() -> Iterator[Path]:
    """Return libraries with symbols for debuggers: those of uvloop are 12 MB."""
    for library in sorted(PACKAGES.rglob("*.so")):
        with library.open("rb") as file:
            if b".debug_info\0" in file.read():
                yield library


def _compile(modules: tuple[str, ...]) -> None:
    """Compile what the modules import: all modules would be several times as much."""
    script = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    script += "for m in list(sys.modules.values()):\n"
    script += "    if (getattr(m, '__file__', None) or '').endswith('.py'): print(m.__file__)"
    environment = os.environ | {"PYTHONPATH": f"{APP}:{PACKAGES}", "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", script, *modules],
        check=True,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    sys.pycache_prefix = str(BYTECODE)
    for name in sorted(set(found.stdout.split())):
        compileall.compile_file(
            name, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
