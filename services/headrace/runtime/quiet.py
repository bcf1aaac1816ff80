"""Keep gRPC's own log off standard error; import it before grpc, which reads its level when it is imported.

Core writes lines of plain text, not JSON, one or more per malformed call, with text that the peer chose: a
GOAWAY's debug text with a newline in it forges a log line. GRPC_VERBOSITY (ERROR, INFO, DEBUG) shows them.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
