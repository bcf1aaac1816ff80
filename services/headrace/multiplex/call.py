"""Define what a caller sees of one call of Generate, whichever way it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from headrace.v1 import generation_pb2 as pb

# Takes an event, or returns False without an effect.
Take: TypeAlias = Callable[[pb.GenerateResponse], bool]


class Call(Protocol):
    """One call of Generate."""

    async def next(self) -> pb.GenerateResponse | None:
        """Wait for the next event; None at the end of the call. Raises a HeadraceError."""
        ...

    def offer(self, take: Take) -> None:
        """Offer each further delta to *take* as it arrives, while `next` waits.

        `next` returns those that are not taken or not offered: a call may offer none. What *take* raises ends
        the call.
        """
        ...

    def cancel(self) -> None:
        """Cancel the call; has no effect after its end."""
        ...

    def fail(self, error: Exception) -> None:
        """End the call: `next` raises *error*."""
        ...
