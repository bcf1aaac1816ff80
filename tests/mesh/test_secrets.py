"""Secrets of callers appear in nothing that a process writes or returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace import errors
from headrace.channel import open_channel
from headrace.cli.launch.mesh import MeshSpec, mesh
from headrace.client import connect
from headrace.v1 import admin_service_pb2 as admin
from headrace.v1.admin_service_pb2_grpc import AdminServiceStub
from tests.harness import PATIENCE, collect, prompt
from tests.issuer import AUDIENCE, ISSUER, SigningKey, jwks
from tests.security import RPCS, Callers, bearer, verdict

WRONG = "hr_WRONGWRONGWRONGWRONGWRONGWRONGWRONGWRONG"


async def test_tokens_are_in_no_log_span_metric_error_or_debug_endpoint(tmp_path: Path) -> None:
    """Right ones, wrong ones and malformed ones, with real processes that log as much as they can."""
    callers = Callers(tmp_path / "callers.toml")
    right = [callers.add("caller"), callers.add("ops", scopes=("admin",))]
    key = SigningKey("key")
    (tmp_path / "jwks.json").write_bytes(jwks(key))
    web = [key.token(), key.token(aud="other"), key.token(exp=1), SigningKey("none").token()]
    sent = [*right, WRONG, *web]
    malformed = [f"Bearer {right[0]} {right[1]}", f"Basic {right[0]}", right[0], f"Bearer {web[0]}x"]
    logs = tmp_path / "logs"
    spec = MeshSpec(
        cache=tmp_path,
        log_dir=logs,
        fake=True,
        fake_step_seconds=0,
        processes=1,
        environment={
            "HEADRACE_LOG_LEVEL": "DEBUG",
            "GRPC_VERBOSITY": "INFO",
            "OTEL_TRACES_EXPORTER": "console",
            "OTEL_METRICS_EXPORTER": "console",
        },
        flags={
            "router": [
                *("--auth-tokens", str(callers.path), "--auth-jwks", str(tmp_path / "jwks.json")),
                *("--auth-issuer", ISSUER, "--auth-audience", AUDIENCE),
            ]
        },
    )
    returned: list[str] = []
    async with mesh(spec) as running, open_channel(running.address) as channel:
        for header in [*(f"Bearer {token}" for token in sent), *malformed]:
            for method, message in RPCS.items():
                metadata = [("authorization", header)]
                if (error := await verdict(channel, method, message, metadata)) is not None:
                    returned.append(f"{error.reason} {error.message} {error.fields}")
        async with connect(running.address, token=right[0], multiplex=True) as client:
            answer = await collect(client, prompt("hello"))
            assert answer.text == "hello"
            own = {"authorization": f"Bearer {WRONG}"}
            with pytest.raises(errors.CredentialsInvalid) as caught:
                async for _ in client.generate(prompt("hello"), timeout=PATIENCE, metadata=own):
                    pass
            returned.append(str(caught.value))
        stub: Any = AdminServiceStub(channel)
        for name, token in callers.tokens.items():
            if name == "ops":
                state = await stub.Inspect(admin.InspectRequest(), metadata=bearer(token), timeout=PATIENCE)
                returned.append(str(state))

    written = {path.name: path.read_text() for path in logs.iterdir()}
    router = written["router.log"]
    assert "call refused" in router
    assert "rpc.method" in router, "spans are there"
    assert any("CREDENTIALS_INVALID" in text for text in returned)
    parts = [*right, WRONG, *(part for token in web for part in token.split("."))]
    for secret in parts:
        # The header of a JWT is not secret, but whoever prints it prints the rest as well.
        for name, text in (*written.items(), ("returned", "\n".join(returned))):
            assert secret not in text, name
