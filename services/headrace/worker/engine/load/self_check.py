"""Check at start that an engine computes the model correctly, and whether it is batch-invariant.

The reference is transformers' own forward pass over the same ids. The engine computes a few sequences alone,
in a batch of ragged chunks and decodes, and resumed from the middle of an answer. Their answers are fixed, so
that the reference can be computed before the layers of the network are changed for a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from headrace.worker.engine.attention_kinds import AttentionKind, Layers
from headrace.worker.engine.flat_step import flatten
from headrace.worker.engine.interface import Memo, ModelInfo, Row, SamplingParams, Token
from headrace.worker.engine.load.refusals import SEE_MODELS, UnsupportedModel
from headrace.worker.engine.plain_attention import attend
from headrace.worker.engine.torch_engine import Computed
from headrace.worker.engine.transformers_attention import IMPLEMENTATION, LayerAttention

# Tokens of the longest sequence of the check, if the model supports as many. The kernels of GPUs compute keys
# in segments of 256, of which a sequence should cross two borders; on a CPU that would take seconds.
CONTEXT = 256
GPU_CONTEXT = 640
SHORTEST = 64  # the smallest context length that the check supports
ANSWER = 8
LONG = 1090  # tokens in the check of attention: many blocks of any size
SEQUENCES = 4
_CHUNK = 50  # tokens of the batch's chunks
_PARAMS = SamplingParams(seed=2**63 + 1, max_tokens=ANSWER, temperature=0.8, top_p=0.95, ignore_eos=True)

# The largest accepted error of logits, relative to the norm of transformers' own. Rounding in float32 causes
# a hundredth of it. bfloat16 is coarser: 0.01 to 0.07 on the default models, where hiding one key too many
# causes 0.08 to 0.6; so the difference between two implementations of transformers counts too.
# int8 against float32: 0.04 to 0.12, where one hidden key causes 0.4 and more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02, "int8": 0.25}

# The largest accepted relative error of attention, compared with plain torch in float32 on the same keys.
_ATTENTION_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class CheckedEngine(Protocol):
    """An engine that also returns the logits of its steps."""

    @property
    def model(self) -> ModelInfo:
        """The loaded model; constant."""
        ...

    def compute(self, rows: Sequence[Row]) -> Computed:
        """Compute all rows, and wait for the results."""
        ...


@dataclass(frozen=True, slots=True)
class Case:
    """A sequence of the check.

    ids      prompt and answer; a step may sample other tokens, and the answer continues with these
    prompt   number of ids that are prompt
    """

    ids: list[int]
    prompt: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of steps in which a batch-invariant engine must give the same results.

    rows     numbers of rows of steps of decodes, at most max_running
    tokens   numbers of tokens of steps with prompts; fewer if too few sequences can run
    """

    rows: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Transcript:
    """The result for one sequence: the sampled tokens, and the logits [answer, vocabulary] they are from."""

    tokens: list[int]
    logits: torch.Tensor


class Expected(Protocol):
    """What the engine should compute for one case."""

    def compare(self, logits: torch.Tensor, first: int, how: str) -> None:
        """Raise UnsupportedModel unless logits of the answer, from its token *first* on, are right."""


class Reference:
    """The logits of transformers' own forward pass over a case, for each token of its answer.

    network   used when logits are first asked for; some passes use the attention of transformers
    dtype     in which the engine computes
    """

    def __init__(self, network: Any, case: Case, dtype: str) -> None:
        self.name = type(network).__name__
        self.agreed: torch.Tensor | None = None  # logits of the engine for the whole answer
        self._dtype = dtype
        self._network = network
        self._case = case
        self._computed: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def compare(self, logits: torch.Tensor, first: int, how: str) -> None:
        """See `Expected`."""
        expected = self.logits("eager")[first:]
        error, allowed = _distance(logits, expected), TOLERANCE[self._dtype]
        if not error <= allowed:
            # Some models do not support sdpa.
            with contextlib.suppress(ValueError):
                other = self.logits("sdpa")[first:]
                error = min(error, _distance(logits, other))
                allowed = max(allowed, 3 * _distance(other, expected))
        if not error <= allowed:
            raise UnsupportedModel(
                f"{self.name} computed {how} differs from transformers: "
                f"its logits have a relative error of {error:.2g}; {SEE_MODELS}"
            )
        if not first:
            self.agreed = logits

    def compute(self) -> None:
        """Compute all logits now; the network is not used any more."""
        self.logits("eager")
        with contextlib.suppress(ValueError):
            self.logits("sdpa")
        self._network = None

    @torch.inference_mode()
    def logits(self, implementation: str) -> torch.Tensor:
        """Return the logits [ANSWER, vocabulary] with an implementation of attention, "eager" or "sdpa".

        Raises ValueError if the model does not support it; every model supports eager.
        """
        if implementation in self._computed:
            return self._computed[implementation]
        if (network := self._network) is None:
            raise ValueError(f"{self.name} does not support {implementation}")
        first, last = self._case.prompt - 1, self._case.prompt - 1 + ANSWER
        ids = torch.tensor([self._case.ids[:last]], device=network.device)
        kept = torch.arange(first, last, device=network.device)
        try:
            network.set_attn_implementation(implementation)
            logits: torch.Tensor = network(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0]
        finally:
            network.set_attn_implementation(IMPLEMENTATION)
        self._computed[implementation] = logits
        return logits


def blocks_needed(block_tokens: int, context: int = CONTEXT) -> int:
    """Return how many blocks of KV memory `check_model` needs for a context length."""
    return SEQUENCES * -(-context // block_tokens)


def step_tokens(context: int) -> int:
    """Return the most tokens of a step of `check_model`: a whole prompt, or a chunk of each sequence."""
    return max(context, SEQUENCES * _CHUNK)


def make_cases(vocabulary: int, context: int) -> list[Case]:
    """Make SEQUENCES sequences of random ids; the first is the one under test.

    context   tokens of the longest sequence: SHORTEST to GPU_CONTEXT
    """
    # The answer of the first prompt starts a new block of KV memory, whether blocks have 32, 64 or 128
    # tokens, and in a context of GPU_CONTEXT a new segment of 256 keys.
    border = max(size for size in (32, 64, 128, 512) if 5 * size <= 4 * context)
    prompts = (border - 3, 1, max(33 * context // CONTEXT, 1), 210 * context // CONTEXT)
    random = torch.Generator().manual_seed(0)
    # An answer that ends early leaves the batch, so the others are longer than the first.
    lengths = [min(prompt + 4 * ANSWER, context) for prompt in prompts]
    return [
        Case(torch.randint(vocabulary, (length,), generator=random).tolist(), prompt)
        for length, prompt in zip(lengths, prompts, strict=True)
    ]


def make_references(network: Any, cases: Sequence[Case], dtype: str, *, now: bool) -> dict[int, Reference]:
    """Make the references of the cases that `check_model` compares, by index; *now*: compute them now."""
    references = {index: Reference(network, cases[index], dtype) for index in (0, 2)}
    if now:
        for reference in references.values():
            reference.compute()
    return references


def check_alone(engine: CheckedEngine, case: Case, expected: Expected, context: int) -> None:
    """Compare only what `check_model` computes first: a case alone."""
    blocks = range(blocks_needed(engine.model.block_tokens, context))
    alone = _run(engine, [case], blocks, chunk=case.prompt)[0]
    expected.compare(alone.logits, 0, "alone")


def check_model(
    engine: CheckedEngine,
    cases: Sequence[Case],
    references: Mapping[int, Expected],
    *,
    context: int,
    sizes: Sizes | None = None,
    concurrent: bool = False,
) -> bool:
    """Compare an engine with transformers' own forward pass, and with itself.

    engine       a fresh engine of `blocks_needed` blocks, for SEQUENCES sequences of *context* tokens
    cases        from `make_cases`
    sizes        of steps in which results must be the same too
    concurrent   the engine does not use the network of the references, so both can compute at the same time

    Returns whether results are bit-identical alone, in a batch and resumed. Raises UnsupportedModel if the
    logits of the engine differ from those of the model.
    """
    case, half = cases[0], ANSWER // 2
    blocks = range(blocks_needed(engine.model.block_tokens, context))
    with ThreadPoolExecutor(max_workers=1) as thread:
        comparisons: list[Future[None]] = []

        def compare(logits: torch.Tensor, index: int, how: str) -> None:
            first = ANSWER - len(logits)
            comparisons.append(thread.submit(references[index].compare, logits, first, how))
            if not concurrent:
                comparisons[-1].result()

        alone = _run(engine, cases[:1], blocks, chunk=case.prompt)[0]
        compare(alone.logits, 0, "alone")
        batched = _run(engine, cases, blocks, chunk=_CHUNK)
        compare(batched[2].logits[:ANSWER], 2, "in a batch")
        compare(batched[0].logits, 0, "in a batch")
        resumed = _run(engine, cases[:1], blocks[1:], chunk=case.prompt + half, answered=half)[0]
        compare(resumed.logits, 0, "resumed")
        for comparison in comparisons:
            comparison.result()
    return (
        alone.tokens == batched[0].tokens
        and alone.tokens[half:] == resumed.tokens
        and torch.equal(alone.logits, batched[0].logits)
        and torch.equal(alone.logits[half:], resumed.logits)
        and (sizes is None or _same_in_all_sizes(engine, case, alone, blocks, sizes))
    )


def _run(
    engine: CheckedEngine, cases: Sequence[Case], blocks: Sequence[int], *, chunk: int, answered: int = 0
) -> list[Transcript]:
    """Compute cases in one batch, until the first has its whole answer; prefill in chunks.

    blocks     each sequence uses every SEQUENCES-th; their previous content must not matter
    answered   number of ids of the answers that are known from the start
    """
    known = [case.prompt + answered for case in cases]
    computed = [0] * len(cases)
    memos = [Memo() for _ in cases]
    tokens: list[list[int]] = [[] for _ in cases]
    logits: list[list[torch.Tensor]] = [[] for _ in cases]
    while known[0] < cases[0].prompt + ANSWER:
        rows, indices = [], []
        for index, case in enumerate(cases):
            if known[index] > len(case.ids):
                continue
            stop = min(known[index], computed[index] + chunk)
            rows.append(
                Row(
                    blocks=blocks[index::SEQUENCES],
                    start=computed[index],
                    stop=stop,
                    ids=case.ids[: known[index]],
                    prompt=case.prompt,
                    sample=stop == known[index],
                    params=_PARAMS,
                    memo=memos[index],
                    version=index + 1,
                )
            )
            indices.append(index)
            computed[index] = stop
        step = engine.compute(rows)
        for sampling, token, sampled in zip(step.sampling, step.tokens, step.logits.clone(), strict=True):
            if not isinstance(token, Token):
                raise UnsupportedModel(
                    f"the model's logits are not finite in {engine.model.dtype}: its weights are damaged or "
                    f"too large for this dtype; download them again, or use --dtype bfloat16 or float32"
                )
            index = indices[sampling]
            known[index] += 1
            tokens[index].append(token.id)
            logits[index].append(sampled)
    return [
        Transcript(own, torch.stack(steps) if steps else torch.empty(0))
        for own, steps in zip(tokens, logits, strict=True)
    ]


def _same_in_all_sizes(
    engine: CheckedEngine, case: Case, alone: Transcript, blocks: Sequence[int], sizes: Sizes
) -> bool:
    """Return whether the first token of an answer is the same first and last in steps of all sizes.

    alone   the results for the case; the blocks that it used still have its keys and values
    """
    own, others = blocks[0::SEQUENCES], blocks[1::SEQUENCES]
    limit = len(others) * engine.model.block_tokens

    def same(tokens: int, fillers: Sequence[tuple[int, int]]) -> bool:
        """Compute the last *tokens* of the prompt, before and after other rows (start, number of tokens)."""
        tested = Row(own, case.prompt - tokens, case.prompt, case.ids, case.prompt, True, _PARAMS)
        # The other rows share blocks, so their results mean nothing, but they are finite.
        rest = [
            Row(others, start, start + count, [index % 31] * limit, limit, True, _PARAMS)
            for index, (start, count) in enumerate(fillers)
        ]
        for place in {0, len(rest)}:
            step = engine.compute([*rest[:place], tested, *rest[place:]])
            token = step.tokens[place]
            if not isinstance(token, Token) or token.id != alone.tokens[0]:
                return False
            if not torch.equal(step.logits[place], alone.logits[0]):
                return False
        return True

    def decodes(rows: int) -> bool:
        return same(1, [((37 * index) % limit, 1) for index in range(rows - 1)])

    def mixed(tokens: int) -> bool:
        chunk = min(tokens, 17, case.prompt)
        left = min(tokens - chunk, (engine.model.max_running - 1) * limit)
        return same(chunk, [(0, min(limit, left - begin)) for begin in range(0, left, limit)])

    return all(map(decodes, sizes.rows)) and all(map(mixed, sizes.tokens))


@torch.inference_mode()
def check_attention(kind: AttentionKind, layers: Layers, device: torch.device, dtype: torch.dtype) -> bool:
    """Compare attention over a long sequence with plain torch, and with itself.

    Sequences that are long enough for kernels to change their algorithm would take too long with the whole
    model.

    Returns whether the result of a token is bit-identical in all chunks and batches. Raises UnsupportedModel
    if it differs from plain torch.
    """
    exact = [_is_exact(kind, own, device, dtype) for own in dict.fromkeys(layers.values())]
    return all(exact)


def _is_exact(kind: AttentionKind, layer: LayerAttention, device: torch.device, dtype: torch.dtype) -> bool:
    random = torch.Generator().manual_seed(1)
    shape = layer.shape
    query, key, value = (
        torch.randn(LONG, heads, width, generator=random).to(device, dtype)
        for heads, width in (
            (layer.heads, shape.key_dim),
            (shape.kv_heads, shape.key_dim),
            (shape.kv_heads, shape.value_dim),
        )
    )
    width = -(-LONG // kind.block_tokens)
    memory = kind.make_memory({0: layer}, 2 * width + 1)

    def attend_parts(*parts: tuple[int, int, int]) -> torch.Tensor:
        """Compute parts (sequence, start, stop) in one step; both sequences are equal."""
        rows = [
            Row(range(2 * width - 1 - which, -1, -2), start, stop, [0] * LONG, LONG, False, _PARAMS)
            for which, start, stop in parts
        ]
        tokens = torch.cat([torch.arange(start, stop, device=device) for _, start, stop in parts])
        assert kind.begin is not None
        attention = kind.begin(memory, flatten(rows, kind.block_tokens))
        return attention(0, query[tokens], key[tokens], value[tokens], layer.masking)

    whole = torch.cat([attend_parts((0, 0, 600)), attend_parts((0, 600, LONG))])
    expected = attend(query, key, value, 0, layer.masking)
    error = _distance(whole.flatten(1), expected.flatten(1))
    if not error <= _ATTENTION_TOLERANCE[dtype]:
        raise UnsupportedModel(f"attention ({kind.name}) over {layer} has a relative error of {error:.2g}")
    attend_parts((1, 0, LONG))
    for last in (70, 200, 500, 511, 512, 700, 1000, LONG - 1):
        alone = attend_parts((0, last, last + 1))[0]
        beside = attend_parts((0, last, last + 1), (1, LONG - 1, LONG))[0]
        chunked = attend_parts((0, last - 40, last + 1), (1, 60, 90))[40]
        if not all(torch.equal(whole[last], own) for own in (alone, beside, chunked)):
            return False
    return True


def _distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the mean over rows of |logits - reference| / |reference|."""
    reference = reference.double()
    return float(((logits.double() - reference).norm(dim=-1) / reference.norm(dim=-1)).mean())
