"""Write the log lines of vLLM, in all of its processes, as the worker writes its own.

vLLM configures logging in each process from the file that VLLM_LOGGING_CONFIG_PATH names. Ours is CONFIG,
which names `handler`.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from headrace.runtime.telemetry.logs import handler_to

CONFIG = Path(__file__).with_name("logging.json")


def handler() -> logging.Handler:
    """Return the handler of vLLM's lines, of the level of VLLM_LOGGING_LEVEL.

    A process of vLLM's own has no other handler yet: there it also writes the warnings of other libraries.
    """
    made = handler_to(sys.stderr, "worker")
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"))
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(made)
        logging.captureWarnings(True)
    return made
