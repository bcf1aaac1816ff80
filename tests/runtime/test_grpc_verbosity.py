"""Each service turns off gRPC's own log before it imports grpc."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("service", ["router", "batcher", "worker"])
def test_a_service_sets_the_level_of_grpcs_own_log_before_grpc_reads_it(service: str) -> None:
    code = (
        "import os, runpy, sys\n"
        f"import headrace.{service}\n"
        "print('grpc' in sys.modules, os.environ['GRPC_VERBOSITY'])\n"
    )
    for given, expected in (({}, "NONE"), ({"GRPC_VERBOSITY": "ERROR"}, "ERROR")):
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(given)
        )
        assert out.stdout.split() == ["False", expected]


def environment(given: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    return {**kept, **given}
