"""Compile the modules that a mesh imports to bytecode: `python -m headrace.cli.launch.precompile`.

`make` installs packages without bytecode, because pip would compile thousands of modules that are never
imported. Without this step, the six processes of a mesh would each compile the same modules.
"""

from __future__ import annotations

import gc
import importlib
import sys

# By name, because the CLI does not import services.
_MODULES = (
    "headrace.cli.__main__",
    "headrace.cli.demo.demo",
    "headrace.gateway.__main__",
    "headrace.router.__main__",
    "headrace.batcher.__main__",
    "headrace.upstream.__main__",
    "headrace.worker.__main__",
    "headrace.worker.engine.load.loading",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "uvloop",
)


def main() -> None:
    """Import the modules, and write bytecode even if the environment forbids it."""
    sys.dont_write_bytecode = False
    gc.disable()
    for module in _MODULES:
        try:
            importlib.import_module(module)
        except ImportError as error:  # the services report it if they need it
            print(f"{module} is not compiled: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
