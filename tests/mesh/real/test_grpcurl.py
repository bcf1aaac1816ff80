"""grpcurl, which people debug with, against the real mesh."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import Any

import pytest

from headrace.cli.launch.mesh import Running

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]  # the mesh first loads its models


async def grpcurl(*arguments: str) -> tuple[int, str]:
    """Run grpcurl. Returns its exit status and its output."""
    binary = shutil.which("grpcurl")
    assert binary is not None, "grpcurl comes with the dev extra"
    process = await asyncio.create_subprocess_exec(
        binary,
        "-plaintext",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await asyncio.wait_for(process.communicate(), 600)
    return process.returncode or 0, printed.decode()


def messages(printed: str) -> list[dict[str, Any]]:
    """Parse the JSON objects of a stream."""
    decoder, found = json.JSONDecoder(), []
    rest = printed.strip()
    while rest:
        message, end = decoder.raw_decode(rest)
        found.append(message)
        rest = rest[end:].strip()
    return found


async def test_list_and_describe(real_mesh: Running) -> None:
    _, services = await grpcurl(real_mesh.address, "list")
    assert {"headrace.v1.GenerationService", "headrace.v1.RoutingService", "grpc.health.v1.Health"} <= set(
        services.split()
    )

    status, described = await grpcurl(real_mesh.address, "describe", "headrace.v1.GenerationService")
    assert status == 0
    assert "rpc Generate ( .headrace.v1.GenerateRequest )" in described
    status, described = await grpcurl(real_mesh.address, "describe")
    assert status == 0, described


async def test_generate_streams_a_real_answer(real_mesh: Running) -> None:
    request = {
        "chat": {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
        "sampling": {"temperature": 0, "max_tokens": 24},
    }
    status, printed = await grpcurl(
        "-d", json.dumps(request), real_mesh.address, "headrace.v1.GenerationService/Generate"
    )

    assert status == 0, printed
    events = messages(printed)
    assert "accepted" in events[0]
    assert "finish" in events[-1]
    assert len(events) > 4, "the answer arrives in several messages"
    text = "".join(event.get("delta", {}).get("text", "") for event in events)
    assert "Paris" in text


async def test_explain_reports_tier_and_shares(real_mesh: Running) -> None:
    request = {"request": {"prompt": "Write a Python function that sorts a list of tuples."}}
    status, printed = await grpcurl(
        "-d", json.dumps(request), real_mesh.address, "headrace.v1.RoutingService/Explain"
    )

    (explained,) = messages(printed)
    assert status == 0
    assert explained["tier"] == "large"
    assert "kind:code" in {share["name"] for share in explained["features"] if share.get("log_odds")}


async def test_every_process_reports_its_health(real_mesh: Running) -> None:
    for process in real_mesh.processes:
        for service in ("readiness", "liveness"):
            status, printed = await grpcurl(
                *("-d", json.dumps({"service": service})),
                f"127.0.0.1:{process.port}",
                "grpc.health.v1.Health/Check",
            )
            assert (status, messages(printed)) == (0, [{"status": "SERVING"}]), process.name


async def test_the_worker_describes_its_model(real_mesh: Running) -> None:
    worker = next(process for process in real_mesh.processes if process.name == "worker-small")
    _, printed = await grpcurl(f"127.0.0.1:{worker.port}", "headrace.v1.WorkerService/GetModel")

    (described,) = messages(printed)
    assert described["model"]["dtype"] == "float32"
    assert described["model"]["vocabulary_size"] == 49152


async def test_an_error_shows_its_reason_and_field(real_mesh: Running) -> None:
    request = {"prompt": "x", "sampling": {"top_p": 7}}
    status, printed = await grpcurl(
        "-d", json.dumps(request), real_mesh.address, "headrace.v1.GenerationService/Generate"
    )

    assert status != 0
    assert "InvalidArgument" in printed
    assert "INVALID_SAMPLING" in printed
    assert "sampling.top_p" in printed
