"""Let vLLM's processes end with the worker, however it ends, and not before.

vLLM starts its engine core, and the engine core its workers, with the start method "spawn": each new process
receives the pickled configuration. vLLM ends them when the worker stops, but a worker that is killed would
leave an engine core behind, which keeps the accelerator's memory. A signal to the worker's process group,
such as Ctrl-C in a terminal, would end the engine core while the worker still drains. `EndWithParent` in the
configuration prevents both.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing import process

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class EndWithParent(str):
    """Makes each process that it is sent to be killed when the process that started it ends.

    Each of them becomes a process group of its own.

    A string, because vLLM writes its configuration as JSON as well.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[type[EndWithParent] | object, tuple[object, ...]]:
        return _received, (str(self), os.getpid())


def _received(text: str, sender: int) -> EndWithParent:
    # The attribute is true while a started process unpickles its arguments, and only there: not in another
    # machine's process that Ray has started.
    if sys.platform == "linux" and getattr(process.current_process(), "_inheriting", False):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != sender:  # it ended before the request
            os._exit(1)
        os.setpgid(0, 0)
    return EndWithParent(text)
