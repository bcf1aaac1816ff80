"""What a mesh does with the cores of a machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cli.launch.cores import MOST_PROCESSES, cores, parallel_processes, quota, worker_threads

if TYPE_CHECKING:
    from pathlib import Path


@given(available=st.integers(1, 512), tiers=st.integers(1, 8), threads=st.integers(1, 64))
def test_processes_never_exceed_the_free_cores_unless_there_is_one_of_each(
    available: int, tiers: int, threads: int
) -> None:
    processes = parallel_processes(available, tiers, threads=threads)

    assert 1 <= processes <= MOST_PROCESSES
    assert processes == 1 or processes * (1 + tiers) + tiers * threads <= available
    assert parallel_processes(available + 1, tiers, threads=threads) >= processes


@pytest.mark.parametrize(("available", "threads"), [(1, 1), (2, 1), (4, 2), (16, 8), (64, 32)])
def test_two_models_share_all_cores(available: int, threads: int) -> None:
    assert worker_threads(available, 2) == threads
    assert parallel_processes(available, 2, threads=threads) == 1


@pytest.mark.parametrize(
    ("own", "limits", "allowed"),
    [
        pytest.param("0::/\n", {".": "400000 100000"}, 4, id="a container"),
        pytest.param("0::/../../pod\n", {".": "150000 100000"}, 1, id="a name of the host"),
        pytest.param("0::/a/b\n", {"a": "200000 100000", "a/b": "max 100000"}, 2, id="a quota of a parent"),
        pytest.param("0::/a\n", {"a": "max 100000"}, sys.maxsize, id="no quota"),
        pytest.param("4:cpu:/a\n", {"a": "100000 100000"}, sys.maxsize, id="no groups of version 2"),
    ],
)
def test_the_cpu_quota_of_a_container_is_respected(
    tmp_path: Path, own: str, limits: dict[str, str], allowed: int
) -> None:
    """A container of two cores on a large machine would start processes for all cores of the machine."""
    for folder, limit in limits.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "cpu.max").write_text(limit + "\n")
    (tmp_path / "own").write_text(own)

    assert quota(tmp_path, tmp_path / "own") == allowed


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert quota(tmp_path, tmp_path / "missing") == sys.maxsize
    assert cores() >= 1
