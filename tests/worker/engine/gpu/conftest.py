"""Tests of GPU code. Without a CUDA device, Triton's interpreter runs the kernels on CPU tensors."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.worker.engine.gpu.device import HAS_CUDA

# Triton has wheels for Linux only.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["*"]

# These compute nothing on a device.
_WITHOUT_DEVICE = (
    "test_emulated",
    "test_emulated_instructions",
    "test_filling",
    "test_instructions",
    "test_report",
    "test_report_attention",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder: with a GPU, they test its kernels and not only their algorithms."""
    for item in items:
        if HAS_CUDA and Path(__file__).parent in item.path.parents and item.path.stem not in _WITHOUT_DEVICE:
            item.add_marker(pytest.mark.cuda)
