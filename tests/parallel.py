"""Run the suite in several processes with pytest-xdist: `pytest -n 3`.

The tests of a file run in one process and in order, so that what a module's fixtures start is started once.
Files in `TOGETHER` stay in one process as well; those in `APART` and `EACH` are divided. Tests marked `quiet`
measure time: no other test runs beside them.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Files that share processes which their fixtures start: they run in one process of the run, too.
TOGETHER = (
    ("tests/hostile/",),
    ("tests/mesh/real/",),
    tuple(f"tests/faults/test_{name}.py" for name in ("batchers", "load", "routers", "soak")),
)
# Folders whose tests share nothing: each function may run in another process. On a GPU, almost all of their
# time is that of Triton's compiler.
APART = ("tests/worker/engine/gpu/",)
# A file of which each test may run in another process: most load an engine with kernels of its own.
EACH = "tests/worker/engine/gpu/test_cuda.py"
# What takes longest starts first, so that all processes end at about the same time.
FIRST = (
    "tests/hostile/",
    "tests/mesh/real/",
    "tests/faults/",
    "tests/cli/",
    EACH,
    "tests/worker/engine/",
    "tests/batcher/text/",
    "tests/benchmarks/",
)


_FOLDER = "headrace_folder"  # the name under which the processes of a run receive the folder of their lock


def unit_of(nodeid: str) -> str:
    """Return the name of the unit that a test belongs to; the tests of a unit run in one process."""
    path = nodeid.partition("::")[0]
    if path == EACH:
        return nodeid
    if path.startswith(APART):
        return nodeid.partition("[")[0]
    return next((unit[0] for unit in TOGETHER if path.startswith(unit)), path)


class Scheduler(LoadScopeScheduling):  # type: ignore[misc]
    """Assigns whole units, in the order of collection."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)

    def remove_node(self, node: Any) -> str | None:
        """Return the test in which *node* died, if any. xdist alone would assign it again."""
        units = self.assigned_work[node]
        crashed = next((test for unit in units.values() for test, done in unit.items() if not done), None)
        if crashed is not None:
            units[unit_of(crashed)][crashed] = True
        super().remove_node(node)
        return crashed


class Quiet:
    """A lock between the processes of a run: tests share it, and a quiet test has it for itself.

    folder   where the lock's files are; the same for all processes of a run
    """

    def __init__(self, folder: Path) -> None:
        self._gate = os.open(folder / "gate", os.O_CREAT | os.O_RDWR)
        self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
        self._alone = False
        self._started = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of a test's durations and time limit
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Hold the lock while a test runs, and from one quiet test to the next."""
        if not self._alone:
            self._alone = quiet(item)
            if not (self._started or self._alone) and any(map(quiet, item.session.items)):
                time.sleep(1)  # `FIRST` has quiet tests: they take the lock before a long test does
            self._started = True
            # A quiet test that waits holds the gate, so that tests of other processes queue behind it.
            fcntl.flock(self._gate, fcntl.LOCK_EX)
            fcntl.flock(self._lock, fcntl.LOCK_EX if self._alone else fcntl.LOCK_SH)
            fcntl.flock(self._gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            if not (self._alone and nextitem is not None and quiet(nextitem)):
                self._alone = False
                fcntl.flock(self._lock, fcntl.LOCK_UN)


def quiet(item: pytest.Item) -> bool:
    """Return whether a test must run alone."""
    return item.get_closest_marker("quiet") is not None


class Worker:
    """Hooks of each process that runs tests."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort what takes longest to the front."""
        items.sort(key=lambda item: rank_of(item.nodeid))


def rank_of(nodeid: str) -> int:
    """Return a test's place in `FIRST`."""
    return next((rank for rank, prefix in enumerate(FIRST) if nodeid.startswith(prefix)), len(FIRST))


class Controller:
    """Hooks of the process that assigns the tests."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="headrace-tests-")

    def pytest_configure_node(self, node: Any) -> None:
        """Pass the folder of the lock to a new process."""
        node.workerinput[_FOLDER] = self._folder.name

    def pytest_unconfigure(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()

    @pytest.hookimpl(tryfirst=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Scheduler:
        """Schedule whole units."""
        config.option.loadscopereorder = False  # the order is FIRST's
        return Scheduler(config, log)


def take_part(config: pytest.Config) -> None:
    """Register the hooks of this process, if the run has several: call it from `pytest_configure`."""
    run: dict[str, Any] | None = getattr(config, "workerinput", None)
    if run is not None:
        # The processes share the cores; torch is not imported yet.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        config.pluginmanager.register(Worker())
        config.pluginmanager.register(Quiet(Path(run[_FOLDER])))
    elif config.getoption("dist", "no") != "no":
        config.pluginmanager.register(Controller())
