"""Build the images, try them, print sizes and checks: `python -m tests.deploy.images`.

It exits with 1 if a check fails, and with 2 if images cannot be built on this machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from headrace import models
from tests.deploy.images import building, trying
from tests.deploy.images.building import ROOT, SERVICES, Built
from tests.deploy.images.engine import Engine, Failed, Missing
from tests.deploy.images.report import Check, table

FOLDER = ROOT / "build" / "images"


def main() -> int:
    """Do all of it. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.deploy.images", description="Build the images and try them."
    )
    parser.add_argument(
        "--base", default="any", help='"official", "stand-in", "any" for the first that can be had, or a name'
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for images and containers")
    parser.add_argument(
        "--keep", action="store_true", help="keep the folder, so that the next build is quick"
    )
    parser.add_argument(
        "--rebuild",
        nargs="*",
        default=["gateway", "router", "batcher"],
        choices=SERVICES,
        help="what is built twice to compare",
    )
    parser.add_argument("--no-model", action="store_true", help="try the echo engine only")
    options = parser.parse_args()
    try:
        engine = Engine(options.folder)
    except Missing as error:
        print(f"images cannot be built here: {error}", file=sys.stderr)
        return 2
    try:
        return _run(engine, options)
    except (Failed, Missing) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if not options.keep:
            engine.close()


def _run(engine: Engine, options: argparse.Namespace) -> int:
    base = building.base_image(engine, options.base)
    print(f"base image: {base}", flush=True)
    images: dict[str, Built] = {}
    checks: list[Check] = []
    for service in SERVICES:
        images[service] = built = building.build(engine, base, service)
        print(f"{service}: {built.size / 1e6:.0f} MB, built in {built.seconds:.0f} s", flush=True)
        checks += trying.contents(engine, built, service)
    for service in options.rebuild:
        again = building.build(engine, base, service, tag="again", anew=True)
        same = sum(ours == theirs for ours, theirs in zip(images[service].layers, again.layers, strict=True))
        seen = f"{same} of {len(again.layers)} layers"
        checks.append(Check(service, "has the same layers when built again", same == len(again.layers), seen))
        engine.podman("rmi", again.name)
    checks += trying.echo(engine, images)
    if not options.no_model:
        started = time.monotonic()
        file = models.resolve(trying.MODEL)
        print(f"{trying.MODEL} is there after {time.monotonic() - started:.0f} s", flush=True)
        checks += trying.model(engine, images, file)
    print(table(checks))
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
