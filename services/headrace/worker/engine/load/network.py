"""Load the network of a model folder with transformers, and account for every weight in it.

transformers initialises missing weights randomly and drops unknown ones, with a warning. Both change the
answers of the model, so this module rejects them by name, except for weights that do not affect answers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from headrace.worker.engine.load.free_memory import enough_for_weights
from headrace.worker.engine.load.model_files import inspect
from headrace.worker.engine.load.refusals import (
    SEE_MODELS,
    LoadingError,
    UnsupportedModel,
    as_loading_error,
    unsupported_attention,
)
from headrace.worker.engine.transformers_attention import IMPLEMENTATION

# Older versions of transformers also saved buffers that are computed: masks, positions, frequencies.
_DERIVED = re.compile(
    r"(^|\.)(inv_freq|(cos|sin)_cached|position_ids|masked_bias|(attn|attention)\.bias|causal_mask)$"
)
# Parts that do not affect the next token of a text: towers for images and sound, heads of other tasks, and
# layers that predict several tokens ahead.
_UNUSED_PARTS = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|image_newline|multi_modal_projector|audio_tower|audio_model"
    r"|embed_vision|embed_audio|mtp(_\w+)?|v_head|value_head|score|classifier|qa_outputs)(\.|$)"
)
_QUANTISED = re.compile(
    r"(weight_scale(_inv)?|input_scale|weight_zero_point|weight_packed|qweight|qzeros|scales|g_idx|absmax"
    r"|quant_state.*|SCB|weight_format)$"
)
_MAX_NAMES = 3  # in a message


def read_network(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    warn: Callable[[str], None],
    *,
    allow_pickle: bool = False,
) -> Any:
    """Load the network in evaluation mode, with Headrace's attention.

    device         where the weights are read to
    warn           receives a sentence about weights that are not used
    allow_pickle   whether weights may be pickles

    Raises LoadingError if files are damaged or lack weights, UnsupportedModel if transformers would ignore
    weights that matter.
    """
    inspect(folder, allow_pickle=allow_pickle)
    with (
        quiet_transformers(),
        as_loading_error(f"cannot load the weights in {folder}", f"download them again, or {SEE_MODELS}"),
        enough_for_weights(folder, dtype, device),
    ):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            # None: safetensors if there are any. A pickle is read without the classes that it names.
            use_safetensors=None if allow_pickle else True,
            weights_only=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            # Straight to a GPU: the memory of the machine may be smaller.
            device_map=None if device.type == "cpu" else {"": device},
        )
    network, found = loaded
    account_for_weights(folder, found, warn)
    try:
        network.set_attn_implementation(IMPLEMENTATION)
    except (ValueError, KeyError) as error:
        raise unsupported_attention(network) from error
    return network.eval()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' log of weights: `account_for_weights` reports the same in one sentence."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def account_for_weights(folder: Path, found: dict[str, Any], warn: Callable[[str], None]) -> None:
    """Reject weights that are missing, have a wrong shape or would be dropped; warn about unused parts.

    found   the loading info of transformers: missing_keys, unexpected_keys, mismatched_keys and error_msgs
    """
    if found.get("error_msgs"):
        raise LoadingError(
            f"cannot load the weights in {folder}: {' '.join(str(found['error_msgs'][0]).split())}"
        )
    wrong = sorted(found.get("mismatched_keys") or ())
    if wrong:
        name, held, expected = wrong[0]
        raise LoadingError(
            f"{folder}: {len(wrong)} weights do not match config.json, the first of them {name}: the file "
            f"has {list(held)}, the config expects {list(expected)}; use the config.json of these weights"
        )
    missing = sorted(found.get("missing_keys") or ())
    if missing:
        raise LoadingError(
            f"{folder} lacks {len(missing)} weights, the first of them {missing[0]}; use the config.json "
            f"of these weights, or download them again"
        )
    unexpected = [name for name in sorted(found.get("unexpected_keys") or ()) if not _DERIVED.search(name)]
    unused = [name for name in unexpected if _UNUSED_PARTS.search(name)]
    dropped = [name for name in unexpected if not _UNUSED_PARTS.search(name)]
    if dropped:
        raise UnsupportedModel(f"{folder} {_describe_dropped(dropped)}")
    if unused:
        warn(
            f"{len(unused)} weights of {folder} are not used ({_names(unused)}): parts for images, sound or "
            f"other tasks; Headrace serves only the text model"
        )


def _describe_dropped(names: Collection[str]) -> str:
    what = f"has {len(names)} weights that its config.json does not describe ({_names(names)})"
    if any(_QUANTISED.search(name) for name in names):
        return (
            f"{what}: it is quantised, but config.json has no quantization_config. Use the model's original "
            f"weights (Headrace quantises them with --dtype int8), or a gguf file"
        )
    if any(".lora_" in name or ".base_layer." in name for name in names):
        return f"{what}: a LoRA adapter. Merge it into its base (peft: merge_and_unload), and use the result"
    return f"{what}; without them its answers would be wrong. Use the config.json of these weights"


def _names(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_MAX_NAMES])
    return shown if len(names) <= _MAX_NAMES else f"{shown}, ..."
