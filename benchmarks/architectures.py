"""Find out which causal language models of transformers a worker serves, and why it rejects the others.

    python -m benchmarks.architectures --write docs/models.md

For each architecture, the script saves a tiny network with random weights, and loads it as a worker loads a
model. The self-check of the worker compares its logits with those of transformers, and tests whether results
are bit-identical alone, in a batch and resumed. Each architecture runs in a separate process with a time
limit. Formats are tested in the same way, with a tiny Llama. The result is a page of Markdown.
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
from headrace.worker.engine.load.refusals import LoadingError, one_line

SECONDS = 90.0  # time limit of one architecture
_MAX_PARAMETERS = 20_000_000
_MEMORY_BYTES = 6 << 30  # limit of a process

# Sizes, by their names in configs. Only fields that a config has are set.
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
    "initializer_range": 0.2,  # large, so that attention affects the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Fields that are also set if their default is None.
_OPTIONAL = ("bos_token_id", "eos_token_id", "pad_token_id", "head_dim")

# Additional or different fields of some configs.
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
    """The result for one architecture or format.

    name     model_type of the config, or the format
    network  class of the network
    result   "exact", "served" (correct, but not batch-invariant), "rejected" or "not tested"
    detail   why it was rejected or not tested; otherwise what computes it
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
    """Return the fields that make a config small; for nested configs, all of their fields."""
    sizes = {**_SMALL, **{aliases[name]: value for name, value in _SMALL.items() if name in aliases}, **own}
    if "kv_lora_rank" in default:  # latent attention: the head dimension is that of the part with rope
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
    """Return whether a field has an entry per layer, so that it must not be copied to fewer layers."""
    return name == "per_layer_config" or (isinstance(value, list) and len(value) == layers)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def try_folder(folder: Path) -> tuple[str, str]:
    """Load a model folder as a worker does, and return result and detail as in `Outcome`."""
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
        return "rejected", str(error).replace(str(folder), "the folder")
    return ("exact" if engine.model.exact else "served"), ""


def try_architecture(model_type: str) -> Outcome:
    """Make a tiny network of an architecture and load it. Call it in a separate process, see `isolated`."""
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
        if size > _MAX_PARAMETERS:
            return Outcome(
                model_type, name, "not tested", f"the smallest possible network has {size:,} parameters"
            )
        network = auto.from_config(config, attn_implementation="eager", trust_remote_code=False).eval()
        with torch.inference_mode():
            network(input_ids=torch.arange(9)[None], use_cache=False)
    except Exception as error:  # a model's own code may raise any error for an unusual config
        return Outcome(model_type, name, "not tested", f"cannot be made small: {one_line(error)[:160]}")
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
    "pytorch_model.bin, without --allow-pickle": _pickled,
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
    "a LoRA adapter next to its base": _adapted,
}


def try_format(name: str) -> Outcome:
    """Store a tiny Llama in a format, and load it."""
    with tempfile.TemporaryDirectory() as folder:
        FORMATS[name](Path(folder))
        return Outcome(name, "", *try_folder(Path(folder)))


def isolated(function: Callable[[str], Outcome], name: str, seconds: float = SECONDS) -> Outcome:
    """Call a function in a separate process, with a time limit."""
    # Forked from a process that has already done the slow imports, and has no threads that a fork would lose.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(function, name, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            outcome: Outcome = receiver.recv()
            return outcome
        return Outcome(name, "", "not tested", f"timed out after {seconds:.0f} s")
    except EOFError:
        process.join(5)
        return Outcome(name, "", "not tested", f"its process ended with exit code {process.exitcode}")
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

The architectures and file formats that a worker serves, and why it rejects others. This page is generated by
`python -m benchmarks.architectures --write docs/models.md`, with transformers {transformers} and torch
{torch}. The program makes a small network of each architecture with random weights, and loads it in float32
on a CPU, as a worker loads any model.

At every start, a worker compares its logits with those of transformers. A model that it would compute
incorrectly does not start, whether it is listed here or not.

- *exact*: a sequence is bit-identical alone, in a batch, and resumed.
- *served*: computed correctly; rounding may depend on the batch.
- *kernels*: Headrace's own kernels compute the model on CPUs, in int8, bfloat16 or float32, if its sizes
  allow it.
- *transformers' layers*: the code of transformers computes the model, with Headrace's attention.
"""

_GGUF = """`.gguf` files are read for the architectures {gguf}, in every quantisation that the `gguf`
package unpacks. Each metadata key that changes results is read, or rejected by name. Scaled rotary embeddings
(linear, yarn, longrope, Llama 3) are supported. A part of a split file is rejected: join the parts with
`llama-gguf-split --merge`. A LoRA adapter is rejected: merge it with `llama-export-lora`.
"""


def page(architectures: Sequence[Outcome], formats: Sequence[Outcome]) -> str:
    """Format the outcomes as a page of Markdown."""
    served = [one for one in architectures if one.result in ("exact", "served")]
    rejected = [one for one in architectures if one.result == "rejected"]
    rest = [one for one in architectures if one.result == "not tested"]
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    return "\n".join(
        [
            _INTRODUCTION.format(**versions),
            f"## Served: {len(served)} architectures\n",
            *_table(
                ("model_type", "class", "result", "computed by"),
                [(f"`{one.name}`", one.network, one.result, one.detail) for one in served],
            ),
            f"\n## Rejected: {len(rejected)} architectures\n",
            "A worker ends at its start with the reason. Use another model, or vLLM.\n",
            *_table(
                ("model_type", "class", "why"),
                [(f"`{one.name}`", one.network, _short(one.detail)) for one in rejected],
            ),
            f"\n## Not tested: {len(rest)} architectures\n",
            "The program cannot make these small. A worker decides at its start whether it serves them.\n",
            *_table(
                ("model_type", "class", "why"),
                [(f"`{one.name}`", one.network, one.detail) for one in rest],
            ),
            "\n## Formats\n",
            *_table(
                ("format", "result", "message of the worker"),
                [(one.name, one.result, one.detail) for one in formats],
            ),
            "",
            _GGUF.format(gguf=", ".join(f"`{name}`" for name in gguf_config.ARCHITECTURES)),
        ]
    )


def _short(detail: str) -> str:
    """Return the reason for a rejection without the advice that the page contains once."""
    detail = re.sub(r"[;.] [Ss]erve it with transformers.*$|; see docs/models\.md.*$", "", detail)
    return re.sub(r", which Headrace does not compute$", "", detail)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").strip() for cell in line) + " |" for line in lines]


def main() -> None:
    """Test all architectures and formats, and print the page or write it to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="model types to test; all by default")
    parser.add_argument("--write", type=Path, help="output file; standard output by default")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of one architecture")
    options = parser.parse_args()
    outcomes = []
    for name in sorted(options.only or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        outcomes.append(isolated(try_architecture, name, options.seconds))
        print(outcomes[-1], flush=True)
    formats = [isolated(try_format, name, options.seconds) for name in FORMATS]
    text = page(outcomes, formats)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
