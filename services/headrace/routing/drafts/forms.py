"""Check whether a draft that must have a form has it. Pure functions.

A form is a JSON schema, a regular expression and the like, or calls of tools. Findings in texts are about
prose and do not apply to such drafts; those about log-probabilities do, see `DraftChecker.check_certainty`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

CUT_OFF = "the draft was cut off before its form was complete"
NOT_JSON = "the draft is not JSON"
BAD_ARGUMENTS = "the arguments of a call are not a JSON object"


def fault(text: str, arguments: Sequence[str] = (), *, complete: bool, is_json: bool) -> str:
    """Return why the form of a draft makes it useless, in words; empty if nothing is wrong with it.

    arguments   of the calls in it, each as JSON
    complete    whether the model ended its turn by itself
    is_json     whether its text must be JSON. A draft that consists of calls has no such text
    """
    if not complete:
        return CUT_OFF
    if any(not isinstance(_parsed(each or "{}"), dict) for each in arguments):
        return BAD_ARGUMENTS
    if is_json and not arguments and _parsed(text) is _INVALID:
        return NOT_JSON
    return ""


_INVALID = object()


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _INVALID
