"""Say in one line what went wrong and what to do, and end with the exit code that fits.

1: it was tried and failed. 2: it could not be tried, as asked. Bugs keep their traceback.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from headrace import errors
from headrace.channel import proxy_variable, target_problem
from headrace.cli.mesh import BadSpec
from headrace.cli.processes import ChildDied
from headrace.cli.rows import BadRow
from headrace.models import ModelUnavailable
from headrace.routing.artifact import BadArtifact

if TYPE_CHECKING:
    from collections.abc import Iterator


def complain(line: str) -> None:
    """Print an error, in red where there is colour, on standard error."""
    Console(stderr=True, highlight=False).print(f"error: {line}", style="red", markup=False, soft_wrap=True)


def advice(error: errors.HeadraceError, target: str) -> str:
    """Say what to do about a failed call to *target*."""
    if errors.HTTP_STATUS in error.fields:
        return (
            f"{error.message} [{error.reason}]; is {target} the gRPC port of a mesh, and does every proxy "
            "on the way pass HTTP/2 on?"
        )
    # Unavailable itself comes from gRPC; servers of ours send one of its subclasses.
    if type(error) is errors.Unavailable:
        if problem := target_problem(target):
            return problem
        if variable := proxy_variable(target):
            return (
                f"no answer from {target} through the proxy that {variable} names; no_proxy exempts hosts, "
                "and --target names another mesh"
            )
        return f"no mesh at {target}; start one with `headrace up`, or name another with --target"
    hint = next((text for kind, text in _HINTS if isinstance(error, kind)), "")
    return f"{error.message} [{error.reason}]" + (f"; {hint}" if hint else "")


_HINTS: list[tuple[type[errors.HeadraceError], str]] = [
    (errors.UnknownTier, "see `headrace tiers`"),
    (errors.UnknownModel, "see `headrace tiers`"),
    (errors.NoWorkers, "see `headrace tiers` for what is healthy"),
    (errors.Draining, "the server is stopping; try again"),
    (errors.DeadlineExceeded, "give it more time with --timeout, or ask for less with --max-tokens"),
    (errors.Overloaded, "try again in a moment"),
    (errors.Unimplemented, "what --target names does not offer this; ask a router"),
    (
        errors.Unauthenticated,
        "a proxy on the way, or what --target names, asks for credentials",
    ),
    (errors.PermissionDenied, "a proxy on the way, or what --target names, does not allow it"),
    (errors.Aborted, "a proxy or another service ended the call; try again"),
    (errors.Foreign, "no Headrace server sends this: a proxy or another service answers at --target"),
    (errors.RequestCancelled, "something on the way cancelled the call; try again"),
    (errors.InternalError, "the logs of the servers have it in full"),
]


@contextmanager
def complaining(target: str = "") -> Iterator[None]:
    """Turn the failures that a person can do something about into a line and an exit code."""
    try:
        yield
    except errors.HeadraceError as error:
        complain(advice(error, target))
        raise typer.Exit(1) from None
    except (BadSpec, BadRow, BadArtifact, ModelUnavailable) as error:
        complain(str(error))
        raise typer.Exit(2) from None
    except ChildDied as error:
        complain(str(error))
        raise typer.Exit(1) from None
    except BrokenPipeError:  # whoever read has seen enough
        raise
    except OSError as error:
        complain(str(error))
        raise typer.Exit(1) from None
