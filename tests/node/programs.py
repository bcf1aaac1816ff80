"""Run the programs in Node.js of this folder."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from tests.harness import PATIENCE

HERE = Path(__file__).parent


async def node(
    packages: Path, script: str, *arguments: str | Path
) -> tuple[int | None, list[dict[str, Any]]]:
    """Run an example. Returns its exit status, and the lines that it printed."""
    process = await asyncio.create_subprocess_exec(
        *("node", HERE / script, *arguments),
        env=os.environ | {"NODE_PATH": str(packages), "no_grpc_proxy": "127.0.0.1,localhost"},
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
    return process.returncode, [json.loads(line) for line in printed.splitlines()]
