from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.worker.cpus import parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", set()), ("3", {3}), ("0-3", {0, 1, 2, 3}), ("0-1, 8-9,4", {0, 1, 4, 8, 9}), ("node1,0", {0, 2, 3})],
)
def test_lists_ranges_and_nodes_name_cpus(text: str, expected: set[int], tmp_path: Path) -> None:
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text("2-3\n")

    assert parse(text, tmp_path) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a", "'a' is not a CPU, a range"),
        ("-1", "is not a CPU"),
        ("5-2", "the range 5-2 ends before it begins"),
        ("node7", "there is no NUMA node7 on this machine"),
        ("0,node", "'node' is not a CPU"),
    ],
)
def test_text_that_names_no_cpus_is_rejected(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(text, tmp_path)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_a_process_and_its_threads_are_bound_to_their_cpus() -> None:
    one = min(os.sched_getaffinity(0))
    program = f"""
import os, threading
from headrace.worker.cpus import bind, parse
bind(parse("{one}"))
seen = []
thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
thread.start(); thread.join()
assert seen == [{{{one}}}] == [os.sched_getaffinity(0)], seen
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def worker(*flags: str) -> str:
    """Return the output of a worker that cannot start."""
    ended = subprocess.run(
        [sys.executable, "-m", "headrace.worker", "--engine", "echo", "--port", "0", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode != 0
    return ended.stdout + ended.stderr


def test_a_worker_with_unknown_cpus_does_not_start() -> None:
    assert "is not a CPU" in worker("--cpus", "fast")
    assert "cannot bind to CPUs 1000" in worker("--cpus", "1000")
