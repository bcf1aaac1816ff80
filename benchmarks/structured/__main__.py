"""Measure structured output.

    python -m benchmarks.structured generate     write schemas.jsonl
    python -m benchmarks.structured libraries    llguidance and xgrammar on these schemas
    python -m benchmarks.structured answers      answers of a model, one for each schema
    python -m benchmarks.structured steps        what a grammar adds to the time of a step

Each prints a table in Markdown, and writes its figures to a file with --json. `libraries` needs xgrammar.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.structured.data import FILE
from benchmarks.structured.generator import schemas
from benchmarks.structured.models import MODELS


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("generate", "libraries", "answers", "steps"))
    parser.add_argument("--model", nargs="+", default=MODELS, choices=MODELS, help="default: both")
    parser.add_argument("--limit", type=int, default=None, help="schemas, spread over all; default: all")
    parser.add_argument("--coverage", action="store_true", help="of `libraries`: no times, which take long")
    parser.add_argument("--json", type=Path, default=None, help="file for the figures")
    arguments = parser.parse_args()
    if arguments.part == "generate":
        FILE.write_text("".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in schemas()))
        return
    found, table = _measure(arguments)
    print("\n".join(table))
    if arguments.json is not None:
        packages = machine.versions("llguidance", "xgrammar", "torch", "numpy")
        figures = {"machine": machine.describe(), "packages": packages, arguments.part: found}
        arguments.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


def _measure(arguments: argparse.Namespace) -> tuple[Any, list[str]]:
    # Each part imports what the others do not need.
    if arguments.part == "libraries":
        from benchmarks.structured import libraries

        found = libraries.measure(() if arguments.coverage else arguments.model, arguments.limit)
        return found, list(libraries.lines(found))
    if arguments.part == "answers":
        from benchmarks.structured import answers

        answered = answers.measure(arguments.model, arguments.limit)
        return answered, list(answers.lines(answered))
    from benchmarks.structured import steps

    timed = steps.measure(arguments.model)
    return timed, list(steps.lines(timed))


if __name__ == "__main__":
    main()
