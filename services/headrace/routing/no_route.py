"""The errors of `policy` and `request`: why no tier can be chosen for a request.

The router turns each into an exception of `headrace.errors`.
"""

from __future__ import annotations


class NoRoute(Exception):
    """No tier can be chosen. The message is for people: it states the problem and what to do.

    field   the field of the request that is at fault, such as "routing.tier"; empty if none is
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class NoSuchTier(NoRoute):
    """A hint names a tier that does not exist."""


class NoSuchModel(NoRoute):
    """The hints name a model that no tier serves."""


class ConflictingHints(NoRoute):
    """The hints together exclude every tier."""


class NoTierAvailable(NoRoute):
    """No tier that the hints allow can serve the request now. A later attempt may succeed."""
