"""Print an error in one line, with what to do about it, and exit with a suitable code.

1: the command failed. 2: the command cannot run as requested. Bugs keep their traceback.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from headrace import errors
from headrace.bearer import BadToken
from headrace.channel import proxy_variable, target_problem
from headrace.cli.files.rows import BadRow
from headrace.cli.launch.processes import ChildDied
from headrace.cli.launch.tiers import BadSpec
from headrace.models import ModelUnavailable
from headrace.routing.artifact import BadArtifact
from headrace.runtime.security.watched_file import BadFile
from headrace.tls.files import BadTls

if TYPE_CHECKING:
    from collections.abc import Iterator


def complain(line: str) -> None:
    """Print an error on standard error, in red if the terminal has colours."""
    Console(stderr=True, highlight=False).print(f"error: {line}", style="red", markup=False, soft_wrap=True)


def advice(error: errors.HeadraceError, target: str) -> str:
    """Describe a failed call to *target*, and what to do about it."""
    if errors.HTTP_STATUS in error.fields:
        return (
            f"{error.message} [{error.reason}]; check that {target} is the gRPC port of a mesh, and that "
            "every proxy in between forwards HTTP/2"
        )
    # gRPC itself raises Unavailable; the services of Headrace send its subclasses.
    if type(error) is errors.Unavailable:
        if found := error.fields.get(errors.TLS_PROBLEM):
            return (
                f"no connection to {target}: {found}; see --tls-ca, --tls-cert, --tls-key and "
                "--tls-server-name"
            )
        if problem := target_problem(target):
            return problem
        if variable := proxy_variable(target):
            return (
                f"no answer from {target} through the proxy in {variable}; add the host to no_proxy, "
                "or give another mesh with --target"
            )
        return f"no mesh at {target}; start one with `headrace up`, or give another with --target"
    hint = next((text for kind, text in _HINTS if isinstance(error, kind)), "")
    return f"{error.message} [{error.reason}]" + (f"; {hint}" if hint else "")


_HINTS: list[tuple[type[errors.HeadraceError], str]] = [
    (errors.UnknownTier, "see `headrace tiers`"),
    (errors.UnknownModel, "see `headrace tiers`"),
    (errors.NoWorkers, "see `headrace tiers` for the health of tiers"),
    (errors.Draining, "the server is stopping; try again"),
    (errors.DeadlineExceeded, "increase --timeout, or reduce --max-tokens"),
    (errors.Overloaded, "try again in a moment"),
    (errors.Unimplemented, "the server at --target does not support this; call a router"),
    (errors.CredentialsRequired, "give a token with --token-file, or a certificate with --tls-cert"),
    (errors.CredentialsInvalid, "check the file of --token-file"),
    (
        errors.Unauthenticated,
        "a proxy or the server at --target requires credentials",
    ),
    (errors.PermissionDenied, "a proxy or the server at --target does not permit it"),
    (errors.Aborted, "a proxy or another service aborted the call; try again"),
    (errors.Foreign, "Headrace does not send this: a proxy or another service answered at --target"),
    (errors.RequestCancelled, "a proxy or the server cancelled the call; try again"),
    (errors.InternalError, "the logs of the servers have the traceback"),
]


@contextmanager
def complaining(target: str = "") -> Iterator[None]:
    """Convert the failures that a user can act on to an error message and an exit code."""
    try:
        yield
    except errors.HeadraceError as error:
        complain(advice(error, target))
        raise typer.Exit(1) from None
    except (BadSpec, BadRow, BadArtifact, BadTls, ModelUnavailable, BadToken, BadFile) as error:
        complain(str(error))
        raise typer.Exit(2) from None
    except ChildDied as error:
        complain(str(error))
        raise typer.Exit(1) from None
    except BrokenPipeError:  # the reader of the pipe has closed it
        raise
    except OSError as error:
        complain(str(error))
        raise typer.Exit(1) from None
