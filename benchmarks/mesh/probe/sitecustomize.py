"""Record when functions of a service run, or profile the service.

Python imports this module at its start, because `benchmarks.mesh.stages` and `benchmarks.mesh.profiles` put
its folder on PYTHONPATH for the processes that they start. So the services contain no code for it. It imports
nothing of Headrace: functions are wrapped when their modules are imported.

HEADRACE_PROBE_OUT     the file to write when the process ends
HEADRACE_PROBES        functions as MODULE:NAME, separated by spaces: their calls are recorded
HEADRACE_PROBE_SIGNAL  the number of a signal that starts a profile of the main thread
"""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from types import FrameType, ModuleType
from typing import Any

# Of each call: time.monotonic_ns, which all processes of a machine share; MODULE:NAME; "in" or "out". A
# generator is in when its first item is requested, and out at each item.
records: list[tuple[int, str, str]] = []
_clock = time.monotonic_ns


def wrapped(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return *function*, with its calls recorded as *name*."""
    if inspect.isasyncgenfunction(function):

        @wraps(function)
        async def generate(*arguments: Any, **named: Any) -> Any:
            records.append((_clock(), name, "in"))
            items = function(*arguments, **named)
            try:
                async for item in items:
                    records.append((_clock(), name, "out"))
                    yield item
            finally:
                await items.aclose()

        return generate
    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def run(*arguments: Any, **named: Any) -> Any:
            records.append((_clock(), name, "in"))
            try:
                return await function(*arguments, **named)
            finally:
                records.append((_clock(), name, "out"))

        return run

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        records.append((_clock(), name, "in"))
        try:
            return function(*arguments, **named)
        finally:
            records.append((_clock(), name, "out"))

    return call


def wrap(module: ModuleType, probe: str) -> None:
    """Replace the function that *probe* names, MODULE:NAME. Raises AttributeError if there is none."""
    *path, last = probe.partition(":")[2].split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part)
    found = inspect.getattr_static(owner, last)
    if isinstance(found, staticmethod):
        setattr(owner, last, staticmethod(wrapped(found.__func__, probe)))
    else:
        setattr(owner, last, wrapped(found, probe))


class Finder(importlib.abc.MetaPathFinder):
    """Wraps the functions of a module directly after its import, before others import them from it."""

    def __init__(self, probes: Sequence[str]) -> None:
        self._probes = probes

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a module with probes as Python does, and wrap its functions when it is executed."""
        probes = [probe for probe in self._probes if probe.partition(":")[0] == name]
        if not probes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for probe in probes:
                wrap(module, probe)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _write_records(out: str) -> None:
    with open(out, "w") as file:
        json.dump(records, file)


def _profile_on(number: int, out: str) -> None:
    import cProfile
    import pstats

    profile = cProfile.Profile()

    def start(number: int, frame: FrameType | None) -> None:
        profile.enable()

    def write() -> None:
        profile.disable()
        with open(out, "w") as file:
            pstats.Stats(profile, stream=file).strip_dirs().sort_stats("tottime").print_stats(30)

    signal.signal(number, start)
    atexit.register(write)


if "HEADRACE_PROBE_OUT" in os.environ:
    _kind = next((argument for argument in sys.orig_argv if argument.startswith("headrace.")), "headrace")
    _out = os.environ["HEADRACE_PROBE_OUT"].replace("KIND", _kind.rpartition(".")[2])
    if "HEADRACE_PROBE_SIGNAL" in os.environ:
        _profile_on(int(os.environ["HEADRACE_PROBE_SIGNAL"]), _out)
    if "HEADRACE_PROBES" in os.environ:
        sys.meta_path.insert(0, Finder(os.environ["HEADRACE_PROBES"].split()))
        atexit.register(_write_records, _out)
