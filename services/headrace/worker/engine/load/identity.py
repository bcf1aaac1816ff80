"""Read the identity of a model folder besides its weights: the ids that end a turn, and a fingerprint.

Needs neither torch nor transformers: a worker with vLLM has an environment without our engine's dependencies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from headrace.worker.engine.load.model_files import read_json
from headrace.worker.engine.load.refusals import as_loading_error

# Tokens that end a turn, from llama.cpp (llama-vocab.cpp, special_eog_ids).
END_OF_TURN = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
    }
)


def read_eos_ids(
    folder: Path, configs: Iterable[object], *, vocabulary: int, warn: Callable[[str], None]
) -> frozenset[int]:
    """Collect the ids that end a turn.

    These are the ids in the configs, the eos token of the tokenizer, and special tokens that are known to end
    turns: many folders name only the token that ends a document.

    configs      the generation config and the config of the text model: each may have an eos_token_id
    vocabulary   ids from this number on do not exist; they are dropped, and *warn* receives a sentence
    """
    ids: set[int] = set()
    with as_loading_error(
        f"the eos_token_id of {folder}", "correct it in config.json and generation_config.json"
    ):
        for config in configs:
            named = getattr(config, "eos_token_id", None)
            ids.update(int(index) for index in ([named] if isinstance(named, int) else named or ()))
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    with as_loading_error(folder / "tokenizer_config.json", "download the tokenizer's files again"):
        eos = settings.get("eos_token")
        ends = END_OF_TURN | {eos["content"] if isinstance(eos, dict) else eos}
        added = {int(index): token for index, token in settings.get("added_tokens_decoder", {}).items()}
    with as_loading_error(folder / "tokenizer.json", "download the tokenizer's files again"):
        more = read_json(folder / "tokenizer.json", optional=True).get("added_tokens") or []
        added |= {int(token["id"]): token for token in more}
        ids.update(
            index for index, token in added.items() if token.get("special") and token["content"] in ends
        )
    beyond = sorted(index for index in ids if not 0 <= index < vocabulary)
    if beyond:
        warn(
            f"{folder} names end-of-turn ids that the model does not have: {beyond[:5]}, of {vocabulary} "
            f"ids; they are ignored"
        )
    return frozenset(ids.difference(beyond))


def weights_fingerprint(folder: Path, digest: str, dtype: str, kernels: str) -> str:
    """Return 16 hex digits, equal for equal weights computed in the same dtype by the same kernels.

    kernels   identifies what computes: a CPU and a GPU round differently, so an answer that moves from one to
              the other is not continued bit-identically

    For a gguf file they depend on its digest. For a folder they depend on config.json and on the size, the
    header and the last kilobyte of each safetensors file: reading all weights would take as long as loading
    them.
    """
    state = hashlib.sha256(f"{kernels} {dtype} {digest}".encode())
    if not digest:
        state.update((folder / "config.json").read_bytes())
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            with path.open("rb") as file:
                size = path.stat().st_size
                header = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 1024
                state.update(f"{path.name} {size}".encode() + file.read(min(header, size)))
                file.seek(max(size - 1024, 0))
                state.update(file.read())
    return state.hexdigest()[:16]
