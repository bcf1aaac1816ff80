"""Load a model folder's network with transformers, and account for every weight in it.

transformers makes up weights that a folder lacks and drops those that it has no place for, with a warning.
Both change what the model answers, so here they are refused by name, unless they are known to change nothing.
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

from headrace.worker.engine.load.model_files import explained, inspect
from headrace.worker.engine.load.refusals import INSTEAD, LoadingError, UnsupportedModel, own_attention
from headrace.worker.engine.transformers_attention import IMPLEMENTATION

# Older versions of transformers saved what can be computed: masks, positions, frequencies.
_DERIVED = re.compile(
    r"(^|\.)(inv_freq|(cos|sin)_cached|position_ids|masked_bias|(attn|attention)\.bias|causal_mask)$"
)
# Whole parts that have no say in the next token of a text: towers for images and sound, heads of other tasks,
# and layers that guess several tokens ahead.
_BESIDE = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|image_newline|multi_modal_projector|audio_tower|audio_model"
    r"|embed_vision|embed_audio|mtp(_\w+)?|v_head|value_head|score|classifier|qa_outputs)(\.|$)"
)
_QUANTISED = re.compile(
    r"(weight_scale(_inv)?|input_scale|weight_zero_point|weight_packed|qweight|qzeros|scales|g_idx|absmax"
    r"|quant_state.*|SCB|weight_format)$"
)
_SHOWN = 3  # names in a message


def read_network(folder: Path, dtype: torch.dtype, device: torch.device, warn: Callable[[str], None]) -> Any:
    """Load the network, with our attention in it, in evaluation mode.

    warn   is given a sentence on whatever in the folder is not used

    Raises LoadingError for files that are damaged or lack weights, UnsupportedModel for those whose weights
    mean more than transformers would read.
    """
    inspect(folder)
    with (
        quiet_transformers(),
        explained(f"cannot load the weights in {folder}", f"download them again, or {INSTEAD}"),
    ):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    network, found = loaded
    account(folder, found, warn)
    try:
        network.set_attn_implementation(IMPLEMENTATION)
    except (ValueError, KeyError) as error:
        raise own_attention(network) from error
    return network.to(device).eval()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' tables of weights out of the log: `account` puts the same in a sentence."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def account(folder: Path, found: dict[str, Any], warn: Callable[[str], None]) -> None:
    """Refuse weights that are missing, have another shape or would be dropped; warn of what changes nothing.

    found   what transformers found: missing_keys, unexpected_keys, mismatched_keys and error_msgs
    """
    if found.get("error_msgs"):
        raise LoadingError(
            f"cannot load the weights in {folder}: {' '.join(str(found['error_msgs'][0]).split())}"
        )
    wrong = sorted(found.get("mismatched_keys") or ())
    if wrong:
        name, held, expected = wrong[0]
        raise LoadingError(
            f"{folder}: {len(wrong)} weights do not fit config.json, the first of them {name}: the file has "
            f"{list(held)}, the config expects {list(expected)}; use the config.json that belongs to these "
            "weights"
        )
    missing = sorted(found.get("missing_keys") or ())
    if missing:
        raise LoadingError(
            f"{folder} lacks {len(missing)} weights, the first of them {missing[0]}; use the config.json "
            f"that belongs to these weights, or download them again"
        )
    left = [name for name in sorted(found.get("unexpected_keys") or ()) if not _DERIVED.search(name)]
    beside = [name for name in left if _BESIDE.search(name)]
    dropped = [name for name in left if not _BESIDE.search(name)]
    if dropped:
        raise UnsupportedModel(f"{folder} {_dropped(dropped)}")
    if beside:
        warn(
            f"{len(beside)} weights of {folder} are not used ({_names(beside)}): parts for images, sound or "
            f"other tasks; Headrace serves the text model"
        )


def _dropped(names: Collection[str]) -> str:
    what = f"has {len(names)} weights that its config.json has no place for ({_names(names)})"
    if any(_QUANTISED.search(name) for name in names):
        return (
            f"{what}: it is quantised, and config.json does not say how. Use the model's original weights "
            f"(Headrace quantises them itself: --dtype int8), or a gguf file"
        )
    if any(".lora_" in name or ".base_layer." in name for name in names):
        return f"{what}: a LoRA adapter. Merge it into its base (peft: merge_and_unload), and name the result"
    return f"{what}; without them it would answer wrongly. Use the config.json that belongs to these weights"


def _names(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, ..."
