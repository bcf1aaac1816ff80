"""Convert a default model to the formats of the peers: `python -m benchmarks.serving.convert --help`.

bf16   a folder as `headrace unpack` writes it: the weights that Headrace loads, and the tokenizer
w8a8   from such a folder, compressed-tensors as vLLM reads them: int8 weights with a scale per output
       channel, rounded to nearest; activations quantised dynamically, with a scale per token
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from headrace import models
from headrace.worker.engine.load.gguf.unpacking import unpack

WEIGHTS = "model.safetensors"


def to_w8a8(source: Path, target: Path) -> None:
    """Quantise the projections of a bf16 folder; embeddings, norms and head are unchanged."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(WEIGHTS))
    tensors = {}
    for name, weight in load_file(source / WEIGHTS).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
        tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _scheme("channel", dynamic=False),
                "input_activations": _scheme("token", dynamic=True),
            }
        },
    }
    (target / "config.json").write_text(json.dumps(config, indent=1))


def _scheme(strategy: str, *, dynamic: bool) -> dict[str, object]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}


def main() -> None:
    """Parse arguments and convert."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", choices=("bf16", "w8a8"))
    parser.add_argument("source", help="a default model's name for bf16, a bf16 folder for w8a8")
    parser.add_argument("target", type=Path, help="the folder to make")
    arguments = parser.parse_args()
    if arguments.format == "bf16":
        unpack(arguments.source, models.cache_folder(), print, arguments.target)
    else:
        to_w8a8(Path(arguments.source), arguments.target)


if __name__ == "__main__":
    main()
