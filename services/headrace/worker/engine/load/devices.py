"""Choose the torch device that computes a model."""

from __future__ import annotations

import torch

from headrace.worker.engine.load.refusals import LoadingError


def choose_device(device: str) -> torch.device:
    """Convert the setting to an available device. Raises LoadingError."""
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise LoadingError(f"device {device!r} is not one of cpu, cuda, cuda:N")
    if chosen.type == "cpu":
        return torch.device("cpu")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (chosen.index or 0) >= available:
        raise LoadingError(
            f"device {device!r} was requested, but torch {torch.__version__} finds {available} CUDA devices; "
            f"use cpu, or install a torch with CUDA on a machine with an NVIDIA driver"
        )
    return torch.device("cuda", chosen.index or 0)
