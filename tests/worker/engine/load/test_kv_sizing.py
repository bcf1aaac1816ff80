"""How much KV memory there is to be."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from headrace.worker.engine.kv_memory import LayerShape, PagedMemory, bytes_per_block
from headrace.worker.engine.load import kv_sizing
from headrace.worker.engine.load.refusals import LoadingError

MiB = 1 << 20
CPU = torch.device("cpu")


@given(
    free=st.integers(0, 1 << 36),
    peak=st.integers(0, 1 << 33),
    block=st.integers(1, 1 << 24),
    fewest=st.integers(1, 100),
    rows=st.integers(1, 64),
)
def test_blocks_fit_beside_a_step_and_hold_a_sequence_or_are_refused(
    free: int, peak: int, block: int, fewest: int, rows: int
) -> None:
    most = fewest * rows
    try:
        blocks = kv_sizing.choose_blocks(
            free=free, peak=peak, share=0.5, block=block, fewest=fewest, most=most
        )
    except LoadingError:
        assert fewest * block > (free - peak) * 0.5
        return

    assert blocks * block <= (free - peak) * 0.5
    assert fewest <= blocks <= most


@given(asked=st.integers(0, 1 << 34), block=st.integers(1, 1 << 24))
def test_what_is_asked_for_is_given_whatever_would_be_enough(asked: int, block: int) -> None:
    assume(asked >= block)

    blocks = kv_sizing.choose_blocks(
        free=1 << 36, peak=0, share=0.1, block=block, fewest=1, most=1, asked=asked
    )

    assert blocks == asked // block


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(LoadingError, match=r"8\.0 GiB .* were asked for, and 3\.0 GiB are free beside"):
        kv_sizing.choose_blocks(
            free=4 << 30, peak=1 << 30, share=0.5, block=MiB, fewest=1, most=9, asked=8 << 30
        )


@given(
    step_tokens=st.integers(1, 200),
    max_running=st.integers(1, 40),
    context_length=st.integers(1, 150),
    block_tokens=st.sampled_from([4, 32, 256]),
)
def test_the_largest_step_is_as_large_as_a_step_may_be(
    step_tokens: int, max_running: int, context_length: int, block_tokens: int
) -> None:
    rows = kv_sizing.largest_step(
        step_tokens=step_tokens,
        max_running=max_running,
        context_length=context_length,
        block_tokens=block_tokens,
    )

    tokens = sum(row.stop - row.start for row in rows)
    longest = context_length + max_running - 1
    assert tokens == min(max(step_tokens, max_running), longest)
    assert len(rows) == max_running
    assert all(row.sample and row.stop == context_length for row in rows)
    assert all(len(row.blocks) * block_tokens >= row.stop for row in rows)
    assert {block for row in rows for block in row.blocks} <= {0, 1}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_of_a_step_is_seen_though_it_is_over() -> None:
    def run() -> None:
        # Not from the heap, which may have kept as much from tests before.
        with mmap.mmap(-1, 64 * MiB) as memory:
            for page in range(0, 64 * MiB, mmap.PAGESIZE):
                memory[page] = 1

    assert 48 * MiB < kv_sizing.peak_bytes(CPU, run) < 256 * MiB


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "self"
    inner = root / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit, used, files in (
        (root / "outer", str(500 * MiB), 450 * MiB, 40 * MiB),
        (inner, str(400 * MiB), 100 * MiB, 0),
    ):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {files}\n")
    own.write_text("0::/outer/inner\n")

    assert kv_sizing.free_in_cgroups(root, own) == 90 * MiB


NO_LIMIT_V1 = 9_223_372_036_854_771_712


def write_v1(folder: Path, limit: int, used: int, files: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 1\ninactive_file 7\ntotal_inactive_file {files}\n")


@pytest.mark.parametrize(
    ("groups", "name", "free"),
    [
        pytest.param({"a": (300, 100, 20)}, "/a", 220, id="its own"),
        pytest.param({"a": (300, 100, 0), "a/b": (NO_LIMIT_V1 // MiB, 50, 0)}, "/a/b", 200, id="around it"),
        pytest.param({"a": (300, 250, 0), "a/b": (100, 20, 0)}, "/a/b", 50, id="the tightest"),
        pytest.param({"a": (300, 100, 0), "a/b": (100, 20, 0)}, "/a/b", 80, id="the innermost"),
        pytest.param({"": (512, 12, 0)}, "/docker/4d7a", 500, id="mounted as the root"),
        pytest.param({"a": (100, 150, 0)}, "/a", 0, id="beyond its limit"),
    ],
)
def test_limits_of_version_1_count(
    groups: dict[str, tuple[int, int, int]], name: str, free: int, tmp_path: Path
) -> None:
    for group, numbers in groups.items():
        write_v1(tmp_path / "cgroup" / "memory" / group, *(number * MiB for number in numbers))
    own = tmp_path / "self"
    own.write_text(f"12:cpuset:/other\n7:hugetlb,memory:{name}\n0::/x\n")

    assert kv_sizing.free_in_cgroups(tmp_path / "cgroup", own) == free * MiB


def test_where_both_versions_are_mounted_the_tighter_counts(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "self"
    write_v1(root / "memory" / "a", 300 * MiB, 0)
    (root / "a").mkdir()
    (root / "a" / "memory.max").write_text(f"{200 * MiB}\n")
    (root / "a" / "memory.high").write_text(f"{150 * MiB}\n")
    (root / "a" / "memory.current").write_text("0\n")
    own.write_text("7:memory:/a\n0::/a\n")

    assert kv_sizing.free_in_cgroups(root, own) == 150 * MiB


def test_a_group_of_version_1_without_a_limit_limits_nothing(tmp_path: Path) -> None:
    write_v1(tmp_path / "cgroup" / "memory", NO_LIMIT_V1, 5 * MiB)
    own = tmp_path / "self"
    own.write_text("7:memory:/\n")

    assert kv_sizing.free_in_cgroups(tmp_path / "cgroup", own) > 1 << 60


@pytest.mark.parametrize("text", ["", "7:memory:/old\n", "0::/../elsewhere\n", "nonsense\n\n"])
def test_without_control_groups_nothing_limits(text: str, tmp_path: Path) -> None:
    own = tmp_path / "self"
    own.write_text(text)

    assert kv_sizing.free_in_cgroups(tmp_path / "cgroup", own) > 1 << 60


def test_a_group_without_a_limit_limits_nothing(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    (tmp_path / "memory.stat").write_text("inactive_file 0\n")
    own = tmp_path / "self"
    own.write_text("0::/\n")

    assert kv_sizing.free_in_cgroups(tmp_path, own) > 1 << 60


def test_memory_of_all_layers_is_one_piece_that_costs_nothing_until_it_is_written() -> None:
    layers = {0: LayerShape(2, 24, 24), 1: LayerShape(1, 40, 8)}
    blocks, tokens = 40_000, 32

    def make() -> None:
        memory = PagedMemory(layers, blocks=blocks, block_tokens=tokens, device=CPU, dtype=torch.float32)
        for index, shape in layers.items():
            keys, values = memory[index]
            assert keys.shape == (blocks, tokens, shape.kv_heads, shape.key_dim)
            assert values.shape == (blocks, tokens, shape.kv_heads, shape.value_dim)
            assert not keys[17].any()
            keys[5].fill_(index + 1)
        assert all(bool((memory[index][0][5] == index + 1).all()) for index in layers)
        assert not any(bool(memory[index][1][5].any()) for index in layers)
        assert len({memory[index][0].untyped_storage().data_ptr() for index in layers}) == 1

    whole = blocks * bytes_per_block(layers, tokens, torch.float32)
    assert whole == blocks * tokens * 4 * (2 * 48 + 48)
    assert kv_sizing.peak_bytes(CPU, make) < whole / 10
