"""Check at start that an engine computes what the model means, and whether it does so bit for bit.

transformers' own forward pass says what the model means. The same few sequences go through the engine
alone, in a batch of ragged chunks and decodes, and resumed from the middle of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from headrace.worker.engine.attention import IMPLEMENTATION, SlotMemory, plan_step, slot_attention, step_order
from headrace.worker.engine.refusals import UnsupportedModel
from headrace.worker.engine.seam import Row, SamplingParams, Token
from headrace.worker.engine.torch_engine import TorchEngine

PROMPT = 125  # the answer crosses 128 keys, where attention goes from one rung to the next
ANSWER = 8
SHORTEST = 256  # tokens that a model must be able to hold, for the check to fit
CONTEXT = SHORTEST
LONG = 1090  # the attention's own test goes into its third block of keys
SLOTS = 4
_PARAMS = SamplingParams(seed=2**63 + 1, max_tokens=ANSWER, temperature=0.8, top_p=0.95, ignore_eos=True)

# How far logits may be from transformers' own, as a share of their norm. Rounding in float32 stays a
# factor of a hundred below. bfloat16 is coarser: 0.01 to 0.07 on the default models, where hiding one key
# too many makes 0.08 to 0.6; so transformers' disagreement with itself counts too.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True, slots=True)
class Transcript:
    """What an engine made of a sequence: all its ids, and the logits [answer, vocabulary] drawn from."""

    ids: list[int]
    logits: torch.Tensor


def check(engine: TorchEngine, network: Any) -> bool:
    """Compare the engine with the model's own forward pass, and with itself.

    engine    a fresh engine with at least SLOTS slots of CONTEXT tokens
    network   its model, whose attention is switched to transformers' own for some passes

    Returns whether sequences come out bitwise the same alone, in a batch and resumed. Raises
    UnsupportedModel when the engine's logits are not the model's.
    """
    config = network.config.get_text_config()
    prompts = _prompts(engine.model.vocabulary_size)
    alone = _run(engine, config, prompts[:1], chunk=PROMPT)[0]
    _compare(alone, network, "alone")
    batched = _run(engine, config, prompts, chunk=50)
    _compare(batched[2], network, "in a batch")
    half = PROMPT + ANSWER // 2
    resumed = _run(engine, config, [alone.ids[:half]], chunk=half, prompt=PROMPT, slot=1)[0]
    return (
        _attention_is_exact(engine, config.num_attention_heads)
        and alone.ids == batched[0].ids == resumed.ids
        and torch.equal(alone.logits, batched[0].logits)
        and torch.equal(alone.logits[ANSWER // 2 :], resumed.logits)
    )


def _prompts(vocabulary: int) -> list[list[int]]:
    """Make SLOTS prompts: the one under test, and neighbours of other lengths."""
    random = torch.Generator().manual_seed(0)
    lengths = (PROMPT, 1, 33, 210)
    return [torch.randint(vocabulary, (length,), generator=random).tolist() for length in lengths]


def _run(
    engine: TorchEngine,
    config: Any,
    prompts: Sequence[Sequence[int]],
    *,
    chunk: int,
    prompt: int | None = None,
    slot: int = 0,
) -> list[Transcript]:
    """Answer prompts together, up to PROMPT + ANSWER ids for the first; prefill in chunks."""
    ids = [list(own) for own in prompts]
    started = [len(own) for own in ids]
    computed = [0] * len(ids)
    logits: list[list[torch.Tensor]] = [[] for _ in ids]
    while len(ids[0]) < PROMPT + ANSWER:
        rows = []
        for index, own in enumerate(ids):
            stop = min(len(own), computed[index] + chunk)
            rows.append(
                Row(
                    slot=slot + index,
                    start=computed[index],
                    stop=stop,
                    ids=own,
                    prompt=started[index] if prompt is None else prompt,
                    sample=stop == len(own),
                    params=_PARAMS,
                )
            )
            computed[index] = stop
        step = engine.compute(rows)
        _look(step.plan.windows, config)
        for index, token, seen in zip(step.sampling, step.tokens, step.logits, strict=True):
            if not isinstance(token, Token):
                raise UnsupportedModel(f"the model's logits are not finite in {engine.model.dtype}")
            ids[index].append(token.id)
            logits[index].append(seen)
    for index in range(len(ids)):
        engine.release(slot + index)
    return [Transcript(own, torch.stack(seen)) for own, seen in zip(ids, logits, strict=True)]


def _look(windows: Mapping[int, int | None], config: Any) -> None:
    """Refuse models whose layers do not all attend through us, or slide without telling us."""
    layers = int(config.num_hidden_layers)
    if windows.keys() != set(range(layers)):
        raise UnsupportedModel(
            f"{len(windows)} of {layers} layers attend through transformers' attention interface; "
            f"recurrent and hybrid models, and those with attention of their own, are not supported"
        )
    # No probe is as long as a real window, so the logits cannot show that one is missing.
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(f"layer {layer} needs {kind}, which is not supported")
        if kind == "sliding_attention" and windows[layer] is None:
            raise UnsupportedModel(f"layer {layer} slides but does not say how far")


@torch.inference_mode()
def _attention_is_exact(engine: TorchEngine, heads: int) -> bool:
    """Say whether attention alone is bitwise the same however long sequences are cut and batched.

    Lengths at which kernels change their ways are too long for the whole model at every start.
    """
    device, dtype = torch.device(engine.model.device), getattr(torch, engine.model.dtype)
    random = torch.Generator().manual_seed(1)
    for kv_heads, width in {engine.memory.shape(layer) for layer in engine.memory.layers}:
        memory = SlotMemory(2, LONG, device=device, dtype=dtype)
        query, key, value = (
            torch.randn(1, count, LONG, width, generator=random).to(device, dtype)
            for count in (heads, kv_heads, kv_heads)
        )

        def attend(*parts: tuple[int, int, int]) -> torch.Tensor:
            """Attend parts (slot, start, stop) in one step; both slots hold the same sequence."""
            rows = [Row(slot, start, stop, (), LONG, False, _PARAMS) for slot, start, stop in parts]
            rows = [rows[i] for i in step_order(rows)]
            here = torch.cat([torch.arange(row.start, row.stop, device=device) for row in rows])
            plan = plan_step(rows, memory, device)  # noqa: B023 -- called in this round only
            layer = SimpleNamespace(layer_idx=0)
            own = (tensor[:, :, here] for tensor in (query, key, value))  # noqa: B023
            seen, _ = slot_attention(layer, *own, attention_mask=None, headrace_step=plan)  # type: ignore[misc,arg-type]
            return seen[0]

        whole = torch.cat([attend((0, 0, 600)), attend((0, 600, LONG))])
        attend((1, 0, LONG))
        for last in (70, 200, 500, 511, 512, 700, 1000, LONG - 1):
            alone = attend((0, last, last + 1))[0]
            beside = attend((0, last, last + 1), (1, LONG - 1, LONG))[0]
            chunked = attend((0, last - 40, last + 1), (1, 60, 90))[40]
            if not all(torch.equal(whole[last], own) for own in (alone, beside, chunked)):
                return False
    return True


@torch.inference_mode()
def _compare(transcript: Transcript, network: Any, how: str) -> None:
    """Compare with forward passes over the whole sequence by transformers' own attention functions."""
    ids = torch.tensor([transcript.ids[:-1]], device=network.device)
    kept = torch.arange(ids.shape[1] - len(transcript.logits), ids.shape[1], device=network.device)
    references = []
    try:
        for implementation in ("eager", "sdpa"):
            try:
                network.set_attn_implementation(implementation)
                logits = network(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0]
            except ValueError:  # sdpa refuses some models; every model has eager
                continue
            references.append(logits)
    finally:
        network.set_attn_implementation(IMPLEMENTATION)
    error = min(_distance(transcript.logits, reference) for reference in references)
    allowed = max(TOLERANCE[network.dtype], 3 * _distance(references[-1], references[0]))
    if not error <= allowed:
        raise UnsupportedModel(
            f"{type(network).__name__} computed {how} is not what transformers computes: "
            f"its logits are off by {error:.2g} of their size"
        )


def _distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the mean over rows of |logits - reference| / |reference|."""
    reference = reference.double()
    return float(((logits.double() - reference).norm(dim=-1) / reference.norm(dim=-1)).mean())
