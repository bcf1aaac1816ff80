"""Try every causal language model that transformers has: which does a worker serve, and why not the others?

    python -m benchmarks.architectures --write docs/models.md

For each architecture a tiny network with random weights is made, saved, and loaded as a worker loads a model:
its logits are compared with those of transformers, and it is tested whether a sequence comes out bit for bit
the same alone, in a batch and resumed. Each runs in a process of its own, bounded in time. Formats are tried
in the same way, on a tiny Llama. The result is a page of markdown.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import re
import resource
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from headrace.worker.engine.cpu import decoder
from headrace.worker.engine.load.gguf import config as gguf_config
from headrace.worker.engine.load.loading import load_engine
from headrace.worker.engine.load.model_files import brief
from headrace.worker.engine.load.refusals import LoadingError

SECONDS = 90.0  # for one architecture
_MOST_PARAMETERS = 20_000_000
_MEMORY_BYTES = 6 << 30  # that a process may allocate

# Sizes by the names that configs use. Only those that a config has are set.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("dense_intermediate_size", "shared_expert_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    "encoder_layers": 2,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    "encoder_attention_heads": 4,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "attention_head_dim", "kv_channels"), 16
    ),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 131),
    "hidden_size_per_layer_input": 16,
    "global_head_dim": 16,
    "num_kv_shared_layers": 0,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k"), 2),
    **dict.fromkeys(
        ("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1
    ),
    **dict.fromkeys(("state_size", "mamba_d_state", "conv_kernel", "mamba_d_conv"), 4),
    "sliding_window": 24,
    "initializer_range": 0.2,  # large, so that attention has a say in the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Set also where a config has None.
_OPTIONAL = ("bos_token_id", "eos_token_id", "pad_token_id", "head_dim")

# What some configs need beside or instead.
_OWN: dict[str, dict[str, Any]] = {
    "falcon": {"num_kv_heads": 4, "new_decoder_architecture": False, "multi_query": False},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "gptj": {"rotary_dim": 8},
    "phi3": {"num_key_value_heads": 4},
    "opt": {"word_embed_proj_dim": 64},
    "bloom": {"hidden_size": 64},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "zamba": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Outcome:
    """What came of one architecture or format.

    name     model_type of the config, or the format
    network  class of the network
    result   "exact", "served" (but not bit for bit the same in batches), "refused" or "not tried"
    detail   why it was refused or not tried; else what computes it
    """

    name: str
    network: str
    result: str
    detail: str = ""


def tiny_config(model_type: str) -> Any:
    """Make a small configuration of an architecture."""
    kind = CONFIG_MAPPING[model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = kind().to_dict()
    own = _OWN.get(model_type, {})
    return kind(**_shrunk(default, getattr(kind, "attribute_map", {}), own))


def _shrunk(default: Mapping[str, Any], aliases: Mapping[str, str], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields to set so that a config becomes small; of configs inside it, all of their fields."""
    sizes = {**_SMALL, **{aliases[name]: value for name, value in _SMALL.items() if name in aliases}, **own}
    if "kv_lora_rank" in default:  # latent attention: the width is that of the part which is rotated
        sizes |= {"num_key_value_heads": sizes["num_attention_heads"], "head_dim": sizes["qk_rope_head_dim"]}
    small: dict[str, Any] = {}
    for name, value in default.items():
        if isinstance(value, dict) and "hidden_size" in value:
            layers = value.get("num_hidden_layers")
            kept = {key: one for key, one in value.items() if not _is_per_layer(key, one, layers)}
            small[name] = {**kept, **_shrunk(value, {}, {})}
        elif name in sizes and (_is_number(value) or (value is None and name in _OPTIONAL)):
            small[name] = sizes[name]
    return {**small, **own}


def _is_per_layer(name: str, value: object, layers: object) -> bool:
    """Return whether a field has an entry for each layer, so it has to be left to be made for fewer."""
    return name == "per_layer_config" or (isinstance(value, list) and len(value) == layers)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def try_folder(folder: Path) -> tuple[str, str]:
    """Load a model folder as a worker does; return result and detail as in `Outcome`."""
    try:
        engine = load_engine(
            folder,
            name=folder.name,
            cache=folder,
            tokenizer_fingerprint="",
            dtype="float32",
            context_length=64,
            max_running=2,
            threads=1,
        )
    except LoadingError as error:
        return "refused", str(error).replace(str(folder), "the folder")
    return ("exact" if engine.model.exact else "served"), ""


def try_architecture(model_type: str) -> Outcome:
    """Make a tiny network of an architecture and try it. Call it in a process of its own: see `apart`."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    auto: Any = transformers.AutoModelForCausalLM
    try:
        torch.manual_seed(7)
        config = tiny_config(model_type)
        with torch.device("meta"):
            size = sum(
                parameter.numel()
                for parameter in auto.from_config(config, trust_remote_code=False).parameters()
            )
        if size > _MOST_PARAMETERS:
            return Outcome(model_type, name, "not tried", f"the smallest built has {size:,} parameters")
        network = auto.from_config(config, attn_implementation="eager", trust_remote_code=False).eval()
        with torch.inference_mode():
            network(input_ids=torch.arange(9)[None], use_cache=False)
    except Exception as error:  # whatever a model's own code says of a config it was not written for
        return Outcome(model_type, name, "not tried", f"cannot be built small: {brief(error)[:160]}")
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        result, detail = try_folder(Path(folder))
    if result in ("exact", "served"):
        detail = "kernels" if name in decoder.ARCHITECTURES else "transformers' layers"
    return Outcome(model_type, name, result, detail)


def _tiny_llama(folder: Path, **saving: Any) -> None:
    torch.manual_seed(7)
    auto: Any = transformers.AutoModelForCausalLM
    auto.from_config(tiny_config("llama"), trust_remote_code=False).save_pretrained(folder, **saving)


def _pickled(folder: Path) -> None:
    _tiny_llama(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def _with_config(**config: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _tiny_llama(folder)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))

    return make


def _cast(folder: Path) -> None:
    _tiny_llama(folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    names = [name for name in weights if name.endswith("proj.weight")]
    save_file(
        {**weights, **{name: weights[name].to(torch.float8_e4m3fn) for name in names}}, path, {"format": "pt"}
    )


def _adapted(folder: Path) -> None:
    _tiny_llama(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


FORMATS: dict[str, Callable[[Path], None]] = {
    "safetensors, one file": _tiny_llama,
    "safetensors, several files with an index": lambda folder: _tiny_llama(folder, max_shard_size="40KB"),
    "pytorch_model.bin (a local folder only)": _pickled,
    **{
        f"{method} ({field})": _with_config(quantization_config={"quant_method": field})
        for method, field in (
            ("GPTQ", "gptq"),
            ("AWQ", "awq"),
            ("compressed-tensors", "compressed-tensors"),
            ("bitsandbytes", "bitsandbytes"),
            ("FP8", "fp8"),
            ("MXFP4", "mxfp4"),
        )
    },
    "8-bit floats without a quantisation config": _cast,
    "a LoRA adapter beside its base": _adapted,
}


def try_format(name: str) -> Outcome:
    """Store a tiny Llama in a format and try it."""
    with tempfile.TemporaryDirectory() as folder:
        FORMATS[name](Path(folder))
        return Outcome(name, "", *try_folder(Path(folder)))


def apart(function: Callable[[str], Outcome], name: str, seconds: float = SECONDS) -> Outcome:
    """Call a function in a process of its own, for at most so many seconds."""
    # Forked from a process that has imported what takes seconds, and runs no thread that a fork would lose.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(function, name, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            outcome: Outcome = ours.recv()
            return outcome
        return Outcome(name, "", "not tried", f"not done in {seconds:.0f} s")
    except EOFError:
        process.join(5)
        return Outcome(name, "", "not tried", f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _report(function: Callable[[str], Outcome], name: str, connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    connection.send(function(name))


_INTRODUCTION = """# Models

Which architectures and formats a worker serves, and why it refuses the others. Written by `python -m
benchmarks.architectures --write docs/models.md`, with transformers {transformers} and torch {torch}.
Each architecture is built tiny, with random weights, and loaded in float32 on a CPU as a worker loads
any model. At each start the worker compares its logits with those of transformers. A model that it would
compute wrong does not start, whether it is listed here or not.

- *exact*: a sequence comes out bit for bit the same alone, in a batch, and resumed.
- *served*: computed right; rounding may depend on the batch.
- *kernels*: Headrace's own kernels compute the model on CPUs, in int8, bfloat16 or float32, where its sizes
  allow it. *transformers' layers*: the code of transformers computes it, with Headrace's attention.
"""

_GGUF = """A gguf file is read for the architectures {gguf}, in every quantisation that the `gguf`
package unpacks. Each key of its metadata that changes the numbers is read, or refused by name; scaled
rotation (linear, yarn, longrope and that of Llama 3) is read. A part of a split file is refused: join
the parts with `llama-gguf-split --merge`. A LoRA adapter is refused: merge it with `llama-export-lora`.
"""


def page(architectures: Sequence[Outcome], formats: Sequence[Outcome]) -> str:
    """Write the outcomes as a page of markdown."""
    served = [one for one in architectures if one.result in ("exact", "served")]
    refused = [one for one in architectures if one.result == "refused"]
    rest = [one for one in architectures if one.result == "not tried"]
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    return "\n".join(
        [
            _INTRODUCTION.format(**versions),
            f"## Served: {len(served)} architectures\n",
            *_table(
                ("model_type", "class", "result", "computed by"),
                [(f"`{one.name}`", one.network, one.result, one.detail) for one in served],
            ),
            f"\n## Refused: {len(refused)} architectures\n",
            "The worker ends at its start, with the reason. Serve another model, or this one with vLLM.\n",
            *_table(
                ("model_type", "class", "why"),
                [(f"`{one.name}`", one.network, _short(one.detail)) for one in refused],
            ),
            f"\n## Not tried: {len(rest)} architectures\n",
            "The script cannot build these small. Whether they are served is decided when a worker starts.\n",
            *_table(
                ("model_type", "class", "why"),
                [(f"`{one.name}`", one.network, one.detail) for one in rest],
            ),
            "\n## Formats\n",
            *_table(
                ("format", "result", "the worker's message"),
                [(one.name, one.result, one.detail) for one in formats],
            ),
            "",
            _GGUF.format(gguf=", ".join(f"`{name}`" for name in gguf_config.ARCHITECTURES)),
        ]
    )


def _short(detail: str) -> str:
    """Return a refusal without what the page says once for all."""
    detail = re.sub(r"[;.] [Ss]erve it with transformers.*$|; see docs/models\.md.*$", "", detail)
    return re.sub(r", which Headrace does not compute$", "", detail)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").strip() for cell in line) + " |" for line in lines]


def main() -> None:
    """Try all, and print the page or write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="model types to try; all by default")
    parser.add_argument("--write", type=Path, help="file to write the page to; standard output by default")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for one architecture")
    options = parser.parse_args()
    outcomes = []
    for name in sorted(options.only or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        outcomes.append(apart(try_architecture, name, options.seconds))
        print(outcomes[-1], flush=True)
    formats = [apart(try_format, name, options.seconds) for name in FORMATS]
    text = page(outcomes, formats)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
