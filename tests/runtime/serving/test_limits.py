"""Limits of a server: compressed messages, headers, open files, and options that core knows."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys

from headrace.runtime.serving import limits
from tests.harness import Mesh
from tests.hostile.wire import GENERATE, message
from tests.runtime.serving.by_hand import VALID, status

MIB = limits.MIB


async def test_compressed_messages_are_rejected_before_they_are_decompressed(small: Mesh) -> None:
    packed = gzip.compress(b"x" * 64 * MIB)

    assert (
        await status(small.port, GENERATE, message(packed, compressed=True), ("grpc-encoding", "gzip"))
        == "UNIMPLEMENTED"
    )


async def test_headers_beyond_the_limit_are_rejected(small: Mesh) -> None:
    assert await status(small.port, GENERATE, VALID, ("x-note", "n" * 4_000)) == "OK"
    assert await status(small.port, GENERATE, VALID, ("x-note", "n" * 16_000)) in (
        "RESOURCE_EXHAUSTED",
        "reset",
        "closed",
    )


def test_the_limit_of_open_files_is_raised_to_the_hard_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = (
        "import json, resource; from headrace.runtime.serving.limits import raise_file_limit\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))\n"
        "raise_file_limit(); print(json.dumps(resource.getrlimit(resource.RLIMIT_NOFILE)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert json.loads(out.stdout) == [hard, hard]


def test_the_core_knows_the_options() -> None:
    """Core silently ignores unknown options, so each name must occur in its binary."""
    from grpc._cython import cygrpc

    with open(cygrpc.__file__, "rb") as library:
        code = library.read()
    for name, _ in limits.Limits().options():
        assert name.encode() in code, name
