"""vLLM's own parser reads the arguments of the manifests and of docs/deployment.md."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.deploy.rendering import combined, container, environment, overlay, workloads

DOCS = Path(__file__).parent.parent.parent / "docs" / "deployment.md"
# Prints what vLLM makes of the flags of a worker.
READ = """
import json, os, sys
from pathlib import Path
from headrace.worker.settings import Settings
from headrace.worker.vllm.arguments import arguments, environment
from headrace.worker.vllm.loading import parse

settings = Settings.load(sys.argv[1:])
os.environ.update(environment(os.environ, debug=False))
given = parse(arguments(settings, Path.cwd()), cache=Path("/cache"))  # any folder that exists
names = ("tensor_parallel_size", "pipeline_parallel_size", "nnodes", "node_rank", "master_addr")
print(json.dumps({name: getattr(given, name) for name in (*names, "logits_processors")}))
"""
ROOT = Path(__file__).parent.parent.parent / "services"


def read(words: Sequence[str]) -> Mapping[str, object]:
    """Return what vLLM reads from the flags of a worker."""
    done = subprocess.run(
        [os.environ["HEADRACE_VLLM_PYTHON"], "-c", READ, *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: Mapping[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """Return *text* with the values of variables, as the kubelet expands them."""
    return re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], text)


def test_the_arguments_of_the_overlay_are_vllms() -> None:
    found = overlay("gpu-vllm")
    for name, gpus in (("worker-small", 1), ("worker-large", 4)):
        given = environment(found, workloads(found)[name])["HEADRACE_ENGINE_ARGS"]

        assert (
            read(["--engine", "vllm", "--model", "m", "--engine-args", given])["tensor_parallel_size"] == gpus
        )


def test_the_pods_of_a_group_have_their_ranks_and_the_address_of_the_leader(tmp_path: Path) -> None:
    worker = workloads(found := combined(tmp_path, [], ["vllm-multinode"]))["worker-small"]
    for rank in ("0", "1"):
        variables = environment(found, worker) | {
            **{"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": rank, "LWS_LEADER_ADDRESS": "worker-small-0.worker"}
        }
        words = [expanded(each, variables) for each in container(worker)["args"]]

        given = read(["--engine", "vllm", "--model", "m", *words])

        assert (given["tensor_parallel_size"], given["pipeline_parallel_size"]) == (8, 2)
        assert (given["nnodes"], given["node_rank"]) == (2, int(rank))
        assert given["master_addr"] == "worker-small-0.worker"
        assert given["logits_processors"], "every rank draws tokens"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_commands_of_two_nodes_are_read_alike(rank: int) -> None:
    commands = [
        line.strip() for line in DOCS.read_text().splitlines() if "--master-addr" in line and "python" in line
    ]
    _, _, module, *words = shlex.split(commands[rank])

    given = read(words)

    assert module == ("headrace.worker" if rank == 0 else "headrace.worker.vllm.headless")
    assert (given["node_rank"], given["nnodes"], given["tensor_parallel_size"]) == (rank, 2, 4)
