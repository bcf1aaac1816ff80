"""The services on hosts of their own: scaled, partitioned and fenced off, and no request is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.network import Network, network, problem
from tests.cluster.policies import ALLOWED
from tests.cluster.scenarios import HOSTS, SCENARIOS
from tests.cluster.services import BATCHER, GATEWAY, PORTS, ROUTER, WORKER
from tests.deploy import test_network_policies as evaluated
from tests.deploy import tools
from tests.deploy.rendering import OF_OVERLAYS, combined, of_kind
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
    if scenario == "forbidden_paths":
        tools.need("nft")
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


def test_the_packet_filters_are_those_of_the_network_policies(tmp_path: Path) -> None:
    """Both come from one intent: who may call whom."""
    policies = list(of_kind(combined(tmp_path, OF_OVERLAYS), "NetworkPolicy").values())
    pods = {
        GATEWAY: evaluated.GATEWAY,
        ROUTER: evaluated.ROUTER,
        BATCHER: evaluated.BATCHER,
        WORKER: evaluated.WORKER,
        "caller": evaluated.INNER_CALLER,
        "outsider": evaluated.NEIGHBOUR,
    }
    allowed = {
        (source, target): evaluated.allows(policies, pods[source], pods[target], PORTS[target])
        for source in pods
        for target in PORTS
    }

    assert allowed == {(source, target): source in ALLOWED[target] for source, target in allowed}
