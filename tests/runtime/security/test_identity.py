"""The identity of a call is known while it is served, and nobody has one by default."""

from __future__ import annotations

import pytest

from headrace.runtime.security.identity import ANONYMOUS, Identity, acting_as, current


def test_outside_a_call_nobody_has_any_rights() -> None:
    with pytest.raises(LookupError):
        current()


def test_the_identity_is_that_of_the_innermost_call() -> None:
    caller = Identity(name="search", scopes=frozenset())
    with acting_as(ANONYMOUS):
        with acting_as(caller):
            assert current() is caller
        assert current() is ANONYMOUS
