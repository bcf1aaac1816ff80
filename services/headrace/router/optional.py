"""Keep optional steps from failing requests: scores, checks, samples, bills and records are not required.

An optional step runs inside an `optional` block. If it raises, the request continues without it.
"""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from types import TracebackType

log = logging.getLogger(__name__)


class optional:  # noqa: N801 - reads as a statement, like contextlib.suppress
    """Log an exception of the block and continue after it. Cancellation is not caught.

    step   name of the step, for the log

    The log has the type and place of the error but not its message, which may quote a prompt or an answer.
    """

    def __init__(self, step: str) -> None:
        self._step = step

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
            "optional step failed, continuing without it",
            extra={"step": self._step, "error": type(error).__name__, "place": place},
        )
        return True
