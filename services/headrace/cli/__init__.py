"""The `headrace` command: start a mesh on this machine, and send requests to any mesh.

`__main__` registers the commands; their flags are in `commands`, their work is in the other folders. The CLI
starts services as processes and calls them over gRPC like any client. It does not import them.
"""

from __future__ import annotations

import sys

from headrace.runtime import grpc_verbosity as grpc_verbosity  # before grpc is imported


def main() -> None:
    """Run `headrace`, or print what to install if only the bare package is installed."""
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
    except KeyboardInterrupt:  # importing takes time on a busy machine
        raise SystemExit(130) from None
    run()
