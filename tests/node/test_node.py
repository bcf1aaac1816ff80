"""Programs in another language use Headrace from the .proto files alone: the examples in Node.js."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace.worker.engine.echo import EchoEngine
from tests.certificates import Certificates, issued
from tests.harness import Mesh, eventually, running_mesh
from tests.node.programs import node
from tests.security import Callers

QUESTIONS = range(1, 101)
INVALID, CANCELLED = 101, 102


async def run(target: str, packages: Path) -> tuple[int | None, dict[int, Any], dict[str, Any]]:
    """Run multiplex.js. Returns its exit status, what it printed of each request, and of the stream."""
    status, (*requests, stream) = await node(packages, "multiplex.js", target)
    answers = {request.pop("handle"): request for request in requests}
    assert len(answers) == len(requests), "a request ended twice"
    return status, answers, stream


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


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return issued(tmp_path / "tls")


@pytest.fixture
def callers(tmp_path: Path) -> Callers:
    made = Callers(tmp_path / "callers.toml")
    made.add("search")
    (tmp_path / "token").write_text(made.tokens["search"] + "\n")
    return made


@pytest.fixture
async def secured(certificates: Certificates, callers: Callers) -> AsyncGenerator[Mesh, None]:
    """A mesh over mutual TLS, whose router also reads tokens."""
    settings = certificates.mesh()
    settings["router_settings"] |= {"auth_tokens": callers.path}
    async with running_mesh("only", engine=lambda: EchoEngine(step_seconds=0.002), **settings) as running:
        yield running


async def call_secured(
    mesh: Mesh, packages: Path, certificates: Certificates, name: str, token: Path
) -> dict[str, dict[str, Any]]:
    """Run secured.js with the certificate of *name*. Returns what it printed of each call."""
    files = certificates.client(name)
    target = f"localhost:{mesh.port}"  # Node has no server names that are addresses
    status, lines = await node(
        packages, "secured.js", target, files["ca"], files["cert"], files["key"], token
    )
    assert status == 0
    return {line.pop("name"): line for line in lines}


async def test_a_program_in_node_streams_and_cancels_through_mutual_tls_with_a_token(
    secured: Mesh, packages: Path, certificates: Certificates, tmp_path: Path
) -> None:
    calls = await call_secured(secured, packages, certificates, "caller", tmp_path / "token")

    answer = calls["answer"]
    assert answer.pop("deltas") > 1
    assert answer == {
        "text": "Hello over TLS.",
        "tier": "only",
        "finish": "FINISH_REASON_STOP",
        "status": "OK",
    }
    assert calls["cancelled"] == {"status": "CANCELLED"}
    await eventually(lambda: not secured.left_behind)
    # The reason is in the ErrorInfo: a program need not read the message.
    inspect = calls["inspect"]
    assert "search may not call" in inspect.pop("message")
    assert inspect == {"status": "PERMISSION_DENIED", "reason": "FORBIDDEN", "fields": {"scope": "admin"}}


async def test_a_program_in_node_reads_why_its_token_is_refused(
    secured: Mesh, packages: Path, certificates: Certificates, tmp_path: Path
) -> None:
    """Although its certificate is one of an administrator: a token decides."""
    token = tmp_path / "wrong"
    token.write_text("hr_wrong\n")
    calls = await call_secured(secured, packages, certificates, "admin", token)

    assert {name: call["status"] for name, call in calls.items()} == {
        "answer": "UNAUTHENTICATED",
        "cancelled": "UNAUTHENTICATED",
        "inspect": "UNAUTHENTICATED",
    }
    assert calls["answer"]["reason"] == calls["inspect"]["reason"] == "CREDENTIALS_INVALID"


async def test_a_program_in_node_without_a_certificate_is_not_connected(
    secured: Mesh, packages: Path, certificates: Certificates, tmp_path: Path
) -> None:
    status, lines = await node(
        packages, "secured.js", f"localhost:{secured.port}", certificates.ca, "", "", tmp_path / "token"
    )

    assert [line["status"] for line in lines] == ["UNAVAILABLE"] * 3
    assert status == 0
