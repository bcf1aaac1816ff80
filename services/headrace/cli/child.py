"""Run a module as a process that does not outlive its parent: `child PARENT_PID MODULE ARGUMENTS...`.

`headrace up` starts every service through this launcher. A parent that ends in an orderly way stops its
children itself; this is for the parent that was killed and could not.
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
    """Arrange for SIGTERM, and so a graceful drain, when the process *parent* is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it died before we had asked to be told
        raise SystemExit(f"the process that started us ({parent}) is gone")


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Become MODULE, as `python -m MODULE ARGUMENTS...` would."""
    parent, module, *arguments = sys.argv[1:]
    die_with(int(parent))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        if (error.name or "headrace").startswith("headrace"):
            raise
        extra = module.rpartition(".")[2]
        raise SystemExit(
            f"{module} needs {error.name}; install it by: pip install 'headrace[{extra}]'"
        ) from None


if __name__ == "__main__":
    main()
