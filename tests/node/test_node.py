"""A program in another language uses Multiplex from the .proto files alone: the example in Node.js."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.harness import PATIENCE, Mesh, eventually

HERE = Path(__file__).parent
INSTALLED = HERE.parent.parent / "build" / "node"
QUESTIONS = range(1, 101)
INVALID, CANCELLED = 101, 102
# What npm reports if it does not reach the registry.
UNREACHABLE = re.compile(
    r"^npm (?:error|ERR!) code (?:EAI_AGAIN|ECONNREFUSED|ECONNRESET|EHOSTUNREACH|ENETUNREACH|ENOTFOUND"
    r"|ERR_SOCKET_TIMEOUT|ETIMEDOUT)$",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def packages() -> Path:
    """Return the folder with the packages that the example imports, installed once for each lockfile."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    lockfile = HERE / "package-lock.json"
    folder = INSTALLED / hashlib.sha256(lockfile.read_bytes()).hexdigest()[:16]
    if not folder.exists():
        INSTALLED.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: an installation that is interrupted is not used.
        with tempfile.TemporaryDirectory(dir=INSTALLED) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            for file in (lockfile, HERE / "package.json"):
                shutil.copy(file, new)
            install(new)
            new.rename(folder)
    return folder / "node_modules"


def install(folder: Path) -> None:
    """Run `npm ci`. Skips the test if the registry cannot be reached."""
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=60000"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode and UNREACHABLE.search(done.stderr):
        pytest.skip(f"npm's registry cannot be reached: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stdout + done.stderr


async def run(target: str, packages: Path) -> tuple[int | None, dict[int, Any], dict[str, Any]]:
    """Run the example. Returns its exit status, what it printed of each request, and of the stream."""
    process = await asyncio.create_subprocess_exec(
        "node",
        HERE / "multiplex.js",
        target,
        env=os.environ | {"NODE_PATH": str(packages), "no_grpc_proxy": "127.0.0.1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        printed, complaints = await asyncio.wait_for(process.communicate(), PATIENCE)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert complaints == b"", complaints.decode()
    *requests, stream = [json.loads(line) for line in printed.splitlines()]
    answers = {request.pop("handle"): request for request in requests}
    assert len(answers) == len(requests), "a request ended twice"
    return process.returncode, answers, stream


async def test_a_program_in_node_gets_every_answer_on_one_stream(
    mesh: Mesh, packages: Path, spans: InMemorySpanExporter
) -> None:
    status, answers, stream = await run(f"127.0.0.1:{mesh.port}", packages)

    assert answers.pop(INVALID) == {
        "error": "INVALID_ARGUMENT",
        "reason": "INVALID_SAMPLING",
        "message": "sampling.temperature is 99, must be 0 to 10",
    }
    assert answers.pop(CANCELLED) == {
        "error": "CANCELLED",
        "reason": "CANCELLED",
        "message": "the caller cancelled the request",
    }
    for answer in answers.values():
        assert answer.pop("tier") in mesh.tiers
    assert answers == {
        handle: {"text": f"This is question {handle}.", "finish": "FINISH_REASON_STOP"}
        for handle in QUESTIONS
    }
    assert stream == {"status": "OK", "details": "", "lost": []}
    assert status == 0
    await eventually(lambda: not mesh.left_behind)
    traces = {span.context.trace_id for span in spans.get_finished_spans() if span.context is not None}
    assert {int(str(handle), 16) for handle in (*QUESTIONS, INVALID, CANCELLED)} <= traces


async def test_a_program_in_node_knows_what_it_lost_with_the_stream(packages: Path) -> None:
    status, answers, stream = await run("127.0.0.1:1", packages)

    assert answers == {}
    assert stream["status"] == "UNAVAILABLE"
    assert stream["lost"] == [*QUESTIONS, INVALID, CANCELLED]
    assert status == 1
