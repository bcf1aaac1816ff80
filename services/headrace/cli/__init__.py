"""The `headrace` command: bring a mesh up on this machine, and talk to any mesh.

`__main__` lists the commands; each has a module of its own beside it. The CLI is a client like any
other: it starts the services as processes and speaks to them over gRPC, and imports none of them.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run `headrace`; say what to install where only the bare package is."""
    try:
        from headrace.cli.__main__ import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("headrace"):
            raise
        print(
            f"headrace: the command needs {error.name}; install it by: pip install 'headrace[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # loading takes a moment, and longer on a busy machine
        raise SystemExit(130) from None
    run()
