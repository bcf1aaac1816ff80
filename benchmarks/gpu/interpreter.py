"""Make Triton's interpreter, which runs kernels without a GPU, faster and the same on every CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np


@cache
def set_up_interpreter() -> None:
    """Change the interpreter if it is in use, once per process."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        _multiply_reproducibly()
        _patch_once_per_launch()
        _remember_types()


def _multiply_reproducibly() -> None:
    """Let the interpreter sum products in float64.

    It multiplies matrices by numpy, whose sums depend on the shapes of the matrices on some CPUs. Rounded
    from float64, they do not, so that exact engines are exact.
    """
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *more: Any) -> Any:
        if a.data.dtype not in (np.float16, np.float32):
            return multiply(self, a, b, d, *more)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    builder.create_dot = create_dot


def _patch_once_per_launch() -> None:
    """Let a launch of a kernel patch `triton.language` once, instead of in each call of a device function.

    The interpreter replaces some hundred functions of it. In small kernels that takes half of the time,
    although a launch restores them only when it ends.
    """
    from triton import language
    from triton.runtime import interpreter

    module, executor = vars(interpreter), vars(interpreter)["GridExecutor"]
    patch, launch = module["_patch_lang"], executor.__call__
    patched: set[tuple[bool, bool]] = set()

    @cache
    def names_of(fn: Callable[..., Any]) -> tuple[bool, bool]:
        """Return which modules, under their names in the module of a function, are to be patched for it."""
        names = fn.__globals__.values()
        return any(name is language for name in names), any(name is language.core for name in names)

    def patch_once(fn: Callable[..., Any]) -> Any:
        names = names_of(fn)
        if names in patched:
            return None  # a launch, which uses the result, is the first to patch
        patched.add(names)
        return patch(fn)

    def launch_once(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            patched.clear()

    module["_patch_lang"], executor.__call__ = patch_once, launch_once


def _remember_types() -> None:
    """Let the interpreter look up a type of numpy. It makes a table of all types for each, very often."""
    from triton.runtime import interpreter

    module = vars(interpreter)
    find, known = module["_get_np_dtype"], {}

    def look_up(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = find(kind)
        return known[name]

    module["_get_np_dtype"] = look_up
