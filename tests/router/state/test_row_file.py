"""A file of rows stays within its size, and several writers lose no row."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from headrace.router.state.row_file import RowFile


def test_processes_that_write_one_file_lose_no_row_when_it_is_rotated(tmp_path: Path) -> None:
    """Two processes of a router may find the file full at the same time; only one of them may rotate it."""
    path, lines, row = tmp_path / "rows.jsonl", 200, b"x" * 99 + b"\n"
    writers = [RowFile(path, max_bytes=len(row) * lines * 2 // 3) for _ in range(2)]

    def write(writer: RowFile) -> None:
        for _ in range(lines // 2):
            writer.append(row)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, writers))

    kept = path.read_bytes() + path.with_name("rows.jsonl.1").read_bytes()
    assert kept == row * lines


def test_rows_that_exceed_the_size_of_the_file_are_rejected(tmp_path: Path) -> None:
    """Otherwise each would rotate the file, and the rows before it would be lost."""
    path = tmp_path / "rows.jsonl"
    file = RowFile(path, max_bytes=100)
    file.append(b"x" * 99 + b"\n")

    with pytest.raises(OSError, match="too large"):
        file.append(b"x" * 100 + b"\n")
    assert path.read_bytes() == b"x" * 99 + b"\n"
    assert not path.with_name("rows.jsonl.1").exists()
