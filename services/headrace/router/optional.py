"""Keep helpers from failing requests: scores, checks, samples, bills and memory help, but none is needed.

A helper runs inside an `optional` block, and its caller goes on without it where it raises.
"""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from types import TracebackType

log = logging.getLogger(__name__)


class optional:  # noqa: N801 - reads as a statement, like contextlib.suppress
    """Log what the block raises and go on after it; cancellation passes through.

    what   the helper's name, for the log

    The log has the error's type and place and not its message, which may quote a prompt or an answer.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        frames = traceback.extract_tb(trace)
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        log.error(
            "helper failed, going on without it",
            extra={"helper": self._what, "error": type(error).__name__, "place": place},
        )
        return True
