"""The services on hosts of their own: scaled, partitioned and fenced off, and no request is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.network import Network, network, problem
from tests.cluster.scenarios import HOSTS, SCENARIOS
from tests.tables import Row, add_row

SECONDS = 300  # the longest that a scenario may take, on a busy machine


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    """Run the network, for all tests of this file."""
    if reason := problem():
        pytest.skip(reason)
    with network(HOSTS) as made:
        yield made


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_request_is_lost(
    scenario: str, hosts: Network, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The scenario's docstring says what is done; its process calls the mesh from the caller's host."""
    if scenario == "forbidden_paths" and shutil.which("nft") is None:
        pytest.skip("packet filters need the command `nft` (Debian: nftables)")
    began = time.monotonic()
    command = (sys.executable, "-m", "tests.cluster.scenarios", scenario, str(os.getpid()), str(tmp_path))
    done = subprocess.run(
        hosts["caller"].command(*command), capture_output=True, text=True, timeout=SECONDS, check=False
    )

    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    figures = json.loads(done.stdout.splitlines()[-1])
    seconds = f"{time.monotonic() - began:.0f}"
    text = ", ".join(f"{key} {value}" for key, value in figures.items())
    head = ("scenario", "seconds", "figures")
    add_row(request.node, Row("cluster", "hosts of a cluster", head, (scenario, seconds, text), figures))
