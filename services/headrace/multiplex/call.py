"""Define what a caller sees of one call of Generate, whichever way it is made."""

from __future__ import annotations

from typing import Protocol

from headrace.v1 import generation_pb2 as pb


class Call(Protocol):
    """One call of Generate."""

    async def next(self) -> pb.GenerateResponse | None:
        """Wait for the next event; None at the end of the call. Raises a HeadraceError."""
        ...

    def cancel(self) -> None:
        """Cancel the call; has no effect after its end."""
        ...

    def fail(self, error: Exception) -> None:
        """End the call: `next` raises *error*."""
        ...
