"""A process that computes on one node for a worker on another: what it refuses, and when it ends."""

from __future__ import annotations

import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from headrace.worker.engine.load.refusals import LoadingError
from headrace.worker.settings import Settings
from headrace.worker.vllm.headless import _require_rank, compute

# Ends when nobody listens at the port of its argument.
WAIT = """
import sys, threading
from headrace.worker.vllm.headless import _end_with
_end_with(("127.0.0.1", int(sys.argv[1])))
print("waiting", flush=True)
threading.Event().wait()
"""


def test_only_vllm_computes_over_several_nodes() -> None:
    with pytest.raises(LoadingError, match="set HEADRACE_ENGINE"):
        compute(Settings(engine="echo"))


@pytest.mark.parametrize(("nodes", "rank"), [(1, 0), (2, 0)])
def test_the_first_node_runs_the_worker_instead(nodes: int, rank: int) -> None:
    with pytest.raises(LoadingError, match=r"`python -m headrace.worker` runs on the one with rank 0"):
        _require_rank(SimpleNamespace(nnodes=nodes, node_rank=rank))

    _require_rank(SimpleNamespace(nnodes=2, node_rank=1))


def test_a_stopped_node_computes_until_its_leader_has_ended() -> None:
    """All pods of a group are stopped at the same time, and the worker still has requests to finish."""
    with socket.create_server(("127.0.0.1", 0)) as leader:
        port = str(leader.getsockname()[1])
        node = subprocess.Popen([sys.executable, "-c", WAIT, port], stdout=subprocess.PIPE, text=True)
        assert node.stdout is not None
        assert node.stdout.readline() == "waiting\n"
        for _ in range(2):  # it looks once a second
            connection, _ = leader.accept()
            connection.close()
        assert node.poll() is None

    assert node.wait(timeout=60) == 0
    node.stdout.close()
