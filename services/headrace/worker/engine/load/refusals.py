"""The errors that end a worker at its start because its model cannot be served.

Each message is one line for the person who starts the worker, and suggests what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

SEE_MODELS = "see docs/models.md for supported architectures"
_MAX_CHARACTERS = 400  # of the text of an error in a message


class LoadingError(Exception):
    """The model cannot be loaded: wrong path, device, dtype or context length, or a damaged file."""


class UnsupportedModel(LoadingError):
    """The files are valid, but this engine would not compute the model correctly."""


@contextmanager
def as_loading_error(subject: Path | str, advice: str) -> Iterator[None]:
    """Convert any exception of the block to a LoadingError of one line: subject, reason and advice.

    The traceback is logged at level DEBUG.
    """
    try:
        yield
    except LoadingError:
        raise
    except PermissionError as error:
        raise LoadingError(
            f"cannot read {error.filename or subject}: permission denied; grant read access to the user of "
            "this process"
        ) from error
    except Exception as error:
        log.debug("loading failed", exc_info=True)
        raise LoadingError(f"{subject}: {one_line(error)}; {advice}") from error


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line, truncated to _MAX_CHARACTERS."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "..."


def unsupported_attention(network: object, detail: str = "") -> UnsupportedModel:
    """Make the error for a network whose attention cannot use Headrace's memory.

    detail   is inserted after "its own attention code"
    """
    return UnsupportedModel(
        f"{type(network).__name__} has its own attention code{detail}, which cannot use Headrace's paged KV "
        f"memory; serve it with transformers or vLLM, or choose another model: {SEE_MODELS}"
    )
