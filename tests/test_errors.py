"""Each error has its own reason, and can be pickled and unwrapped."""

from __future__ import annotations

import pickle

from headrace import errors


def leaves(cls: type[errors.HeadraceError]) -> list[type[errors.HeadraceError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in leaves(sub))]


ALL = [cls for cls in leaves(errors.HeadraceError) if cls is not errors.HeadraceError]


def test_reasons_are_unique() -> None:
    reasons = [cls.reason for cls in ALL]

    assert len(set(reasons)) == len(reasons)


def test_a_group_of_one_is_unwrapped() -> None:
    inner = errors.WorkerLost("gone")

    assert errors.unwrap(ExceptionGroup("a", [ExceptionGroup("b", [inner])])) is inner


def test_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(errors.Overloaded("full", retry_after=2, limit=3)))

    assert (type(error), error.retry_after, error.fields) == (errors.Overloaded, 2, {"limit": "3"})
