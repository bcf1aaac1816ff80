"""Have the Hugging Face hub's own client bring a model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from headrace.models.reports import INSTEAD, ModelUnavailable, Progress, Report


def from_hub(model: str, progress: Report, weights: bool) -> Path:
    """Download a snapshot into the hub's usual cache; weights as safetensors only, never pickles."""
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
        # Folders inside the repository hold other formats (onnx, original); the top is what loads.
        folder = huggingface_hub.snapshot_download(
            model, allow_patterns=wanted, ignore_patterns=["*/*"], tqdm_class=_hub_progress(model, progress)
        )
    except Exception as error:  # its clients raise httpx's, urllib3's, OSError's and its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelUnavailable(
            f"cannot get {model} from the hub: {reason.strip()} ({type(error).__name__}). Check the id, the "
            f"network, HF_ENDPOINT, HF_HUB_OFFLINE and your token, or give a local folder or a .gguf file"
        ) from error
    path = Path(folder)
    if weights and not any(path.glob("*.safetensors")):
        raise ModelUnavailable(f"{model} has no .safetensors, and pickled weights are not loaded; {INSTEAD}")
    return path


def _hub_progress(model: str, progress: Report) -> Any:
    """Make a class that the hub takes for a tqdm bar and that reports bytes to *progress*."""
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    class Bar(tqdm):  # type: ignore[type-arg,misc,unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            answer: bool | None = super().update(n)
            if self.unit == "B":
                progress(Progress(model, "downloading", int(self.n), int(self.total or 0)))
            return answer

    return Bar
