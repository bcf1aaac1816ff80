"""Run a module as a process that ends with its parent: `child PARENT_PID MODULE ARGUMENTS...`.

`headrace up` starts each service with this launcher. A parent that exits normally stops its children itself;
this covers a parent that was killed.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int) -> None:
    """Request SIGTERM, and thereby a graceful drain, for the time when the process *parent* ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before the request
        raise SystemExit(f"the parent process ({parent}) has ended")


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run MODULE as `python -m MODULE ARGUMENTS...` does."""
    parent, module, *arguments = sys.argv[1:]
    die_with(int(parent))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        if (error.name or "headrace").startswith("headrace"):
            raise
        extra = module.split(".")[1]
        raise SystemExit(
            f"{module} needs {error.name}; install it by: pip install 'headrace[{extra}]'"
        ) from None


if __name__ == "__main__":
    main()
