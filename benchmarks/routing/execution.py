"""Run code that a model wrote against assertions, in a process with little time and memory.

The limits protect against accidents, not against malicious code. The models here are small and local.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_SECONDS = 5  # of CPU time; on a busy machine, correct code may take longer by the clock

_PATIENCE_SECONDS = 60
_PROLOGUE = f"""\
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({512 << 20}, {512 << 20}))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
exec(compile(sys.stdin.read(), "answer", "exec"), {{"__name__": "answer"}})
"""


def passes(said: str, assertions: Sequence[str]) -> bool:
    """Whether the Python code in *said*, its first fenced block or all of it, passes every assertion."""
    found = _FENCE.search(said)
    code = found.group(1) if found else said
    if "def " not in code:
        return False
    with tempfile.TemporaryDirectory(prefix="headrace-code-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _PROLOGUE],
                input="\n".join([code, *assertions, "print('passed every assertion')"]),
                cwd=folder,
                env={},
                capture_output=True,
                text=True,
                timeout=_PATIENCE_SECONDS,
                check=False,
            )
        except (subprocess.TimeoutExpired, UnicodeError):
            return False
    return done.returncode == 0 and done.stdout.rstrip().endswith("passed every assertion")
