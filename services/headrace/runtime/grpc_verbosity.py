"""Turn off gRPC's own log on standard error. Import this before grpc, which reads the level on import.

Core writes plain text, not JSON, one or more lines per malformed call, with text from the peer: a newline in
the debug text of a GOAWAY forges a log line. GRPC_VERBOSITY (ERROR, INFO, DEBUG) turns the log on.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
