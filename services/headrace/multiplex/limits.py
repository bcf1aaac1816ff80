"""Define the bounds of a Multiplex stream, for both of its ends. See `multiplex.proto`."""

from __future__ import annotations

MAX_OPENS = 256  # per message
MAX_HANDLES = 4096  # of `cancel` and of `credit`, per message
# A larger request is sent by a call of its own: in a shared message it would delay the events behind it, and
# might exceed the server's limit for the whole message.
LARGE_BYTES = 64 * 1024
# A message of a caller is sent when it has this size, before another request joins it.
MESSAGE_BYTES = 512 * 1024
