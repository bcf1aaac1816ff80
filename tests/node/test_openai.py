"""OpenAI's package for JavaScript works with a gateway unchanged."""

from __future__ import annotations

from pathlib import Path

from headrace.gateway.__main__ import gateway
from headrace.gateway.settings import Settings
from tests.harness import Mesh, eventually
from tests.node.programs import node

TEXT = "Hello from Node – 🚀"


async def test_openais_package_for_node_works_unchanged(mesh: Mesh, packages: Path) -> None:
    async with gateway(Settings(port=0, router=f"127.0.0.1:{mesh.port}")) as running:
        status, lines = await node(packages, "openai.js", f"http://127.0.0.1:{running.port}/v1")
        await eventually(lambda: not mesh.left_behind)

    size = len(TEXT.encode())  # a byte is a token
    assert {line.pop("name"): line for line in lines} == {
        "whole": {"texts": [TEXT, TEXT], "reasons": ["stop", "stop"], "tokens": 3 * size},
        "streamed": {"text": TEXT, "tokens": 2 * size, "tier": "small"},
        "helped": {"text": TEXT},
        "abandoned": {},
        "refused": {"kind": "NotFoundError", "status": 404, "code": "model_not_found"},
        "listed": {"names": ["auto", "small", "large", "echo"]},
    }
    assert status == 0
