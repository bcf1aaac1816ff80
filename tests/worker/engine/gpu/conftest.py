"""Tests of GPU code. Without a CUDA device, Triton's interpreter runs the kernels on CPU tensors."""

from __future__ import annotations

import importlib.util

# Triton has wheels for Linux only.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["*"]
