"""Fixtures: a tiny model folder that a test may change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """Copy a tiny model folder."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), copy)
    return copy
