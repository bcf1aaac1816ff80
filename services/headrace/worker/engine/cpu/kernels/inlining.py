"""The decorator of all kernels: `jit`, and `jit_source` for kernels whose source is generated.

numba optimises each function together with all functions that it calls and generates machine code for them,
and then does the same for each caller, although only entry points (see `cache`) are ever called. With seven
levels of kernels, this takes two thirds of the time of a compilation. So a kernel is only translated to
LLVM's intermediate representation, and is optimised once, as a part of the entry point that calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class _Codegen:
    """The code generator of numba, without environments of functions: those are for machine code."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def set_env(self, name: str, env: Any) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


class _Part(JITCodeLibrary):
    """A function and its callees, to be linked into callers; without machine code."""

    def finalize(self) -> None:
        self._raise_if_finalized()
        for library in dict.fromkeys(self._linking_libraries):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    @property
    def codegen(self) -> Any:
        return _Codegen(self._codegen)


class _PartCompiler(Compiler):
    def __init__(
        self, typing: Any, target: Any, library: Any, args: Any, return_type: Any, flags: Any, local: Any
    ) -> None:
        library = _Part(target.codegen(), "kernel") if library is None else library
        super().__init__(typing, target, library, args, return_type, flags, local)


# Kernels cannot be called from Python. Division by zero gives infinity or NaN, as in hardware: a row that is
# not finite fails alone, while an exception would fail the whole step.
jit = njit(
    nogil=True,
    error_model="numpy",
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
    pipeline_class=_PartCompiler,
)


def jit_source(name: str, lines: Sequence[str], module: str, scope: Mapping[str, Any]) -> Any:
    """Make a kernel from the source of a function.

    name     of the function, as *lines* define it; different kernels of a module must have different names
    lines    its source
    module   the name of the module that makes it
    scope    what it refers to

    numba names machine code by module, function, types of arguments, and a number that is unique in the
    process that compiles. Entry points can be compiled by different processes. A process that loads both
    takes code of the same name from the first.
    """
    scope = {**scope, "__name__": module}
    exec("\n".join(lines), scope)
    return jit(scope[name])
