"""Download models with the client of the Hugging Face hub."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from headrace.models.reports import ALTERNATIVES, FetchProgress, ModelUnavailable, ProgressCallback


def from_hub(model: str, progress: ProgressCallback, weights: bool) -> Path:
    """Download a model to the default cache of the hub's client. Weights are safetensors, never pickles.

    Raises ModelUnavailable.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelUnavailable(
            f"{model} is on the hub, which needs huggingface_hub: pip install 'headrace[worker]'"
        ) from error
    wanted = ["*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges.txt"]
    if weights:
        wanted.append("*.safetensors")
    try:
        # Subfolders have other formats (onnx, original); only the top folder is loaded.
        folder = huggingface_hub.snapshot_download(
            model, allow_patterns=wanted, ignore_patterns=["*/*"], tqdm_class=_hub_progress(model, progress)
        )
    except Exception as error:  # the clients raise exceptions of httpx, urllib3, the system and their own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelUnavailable(
            f"cannot download {model} from the hub: {reason.strip()} ({type(error).__name__}). Check the "
            f"id, the network, HF_ENDPOINT, HF_HUB_OFFLINE and your token, or give a local folder or a .gguf "
            f"file"
        ) from error
    path = Path(folder)
    if weights and not any(path.glob("*.safetensors")):
        raise ModelUnavailable(
            f"{model} has no .safetensors files, and pickled weights are not loaded; {ALTERNATIVES}"
        )
    return path


def _hub_progress(model: str, progress: ProgressCallback) -> Any:
    """Return a subclass of tqdm that reports downloaded bytes to *progress*."""
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    class Bar(tqdm):  # type: ignore[type-arg,misc,unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.unit == "B":
                progress(FetchProgress(model, "downloading", int(self.n), int(self.total or 0)))
            return shown

    return Bar
