"""Compute what a GPU holds of a model, and how fast it decodes: replicas beside tensor parallelism.

Bytes and products come from the shapes of models and the data sheets of cards. The other numbers are
assumptions, listed below; nothing here was measured on a GPU. `benchmarks.gpu.limits` has the limits of a
measured card.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.fleet.simulation import Engine
from benchmarks.gpu.shapes import Shape

GIB = 2**30
BYTES = 2  # of a weight, key or value in bfloat16
USABLE = 0.9  # share of the card's memory for weights, activations and KV memory

# Assumptions.
ACTIVATIONS = 1.5 * GIB  # of each card, CUDA graphs included
EFFICIENCY = 0.7  # share of bandwidth and products that a step reaches
STEP_SECONDS, ROW_SECONDS = 1e-3, 1e-5  # of a step outside of the model: schedule, launch, sample, report


@dataclass(frozen=True)
class Link:
    """What connects cards: seconds of a small all-reduce, launch included, and bytes per second."""

    seconds: float
    bandwidth: float


NVLINK = Link(15e-6, 300e9)
PCIE = Link(60e-6, 15e9)

MODELS = (
    Shape("Qwen3-1.7B", "Qwen3", 151_936, 2048, 6144, 28, 16, 8, 128, True, 1e6),
    Shape("Qwen3-8B", "Qwen3", 151_936, 4096, 12_288, 36, 32, 8, 128, False, 1e6),
    Shape("Qwen3-32B", "Qwen3", 151_936, 5120, 25_600, 64, 64, 8, 128, False, 1e6),
)


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.

    memory      bytes
    bandwidth   bytes per second
    flops       per second, of dense products in bfloat16
    link        to other cards of the same machine
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    link: Link


CARDS = (
    Card("L4, 24 GB", 22.5 * GIB, 0.3e12, 121e12, PCIE),
    Card("H100, 80 GB", 79.6 * GIB, 3.35e12, 989e12, NVLINK),
    Card("H200, 141 GB", 140.4 * GIB, 4.8e12, 989e12, NVLINK),
)


def parameters(shape: Shape) -> int:
    """Return the number of weights that are stored: those that a step reads, and an embedding of its own."""
    return shape.weights + (0 if shape.tied else shape.vocabulary * shape.hidden)


def weight_bytes(shape: Shape) -> int:
    """Return the bytes of all weights."""
    return BYTES * parameters(shape)


def kv_bytes(shape: Shape) -> int:
    """Return the bytes of keys and values of one token: 2 x layers x KV heads x head size x bytes."""
    return BYTES * shape.kv_numbers


def kv_tokens(shape: Shape, card: Card, cards: int = 1) -> int:
    """Return the tokens that fit in KV memory of an engine over *cards* cards; 0 without room for weights."""
    room = cards * (USABLE * card.memory - ACTIVATIONS) - weight_bytes(shape)
    return max(0, int(room // kv_bytes(shape)))


def fewest_cards(shape: Shape, card: Card, tokens: int) -> int:
    """Return the smallest power of two of cards whose KV memory holds so many tokens."""
    cards = 1
    while kv_tokens(shape, card, cards) < tokens:
        cards *= 2
    return cards


def engine(shape: Shape, card: Card, *, context: int, cards: int = 1, most: int = 256) -> Engine:
    """Return the engine of one worker over *cards* cards, for sequences with *context* tokens on average.

    most   sequences that run at a time, if their keys and values fit

    A decode step reads all weights once, and keys and values of each sequence. A prompt token takes two
    operations for each weight. Engines over several cards add two all-reduces for each layer, of the hidden
    states of all rows.
    """
    bandwidth, flops = (EFFICIENCY * cards * rate for rate in (card.bandwidth, card.flops))
    reduces = 2 * shape.layers if cards > 1 else 0
    # A ring sends 2 (n - 1) / n of the bytes over each link.
    reduced = reduces * BYTES * shape.hidden * 2 * (cards - 1) / cards / card.link.bandwidth
    row = max(context * kv_bytes(shape) / bandwidth, 2 * shape.weights / flops)
    return Engine(
        slots=min(most, kv_tokens(shape, card, cards) // context),
        step=STEP_SECONDS + BYTES * shape.weights / bandwidth + reduces * card.link.seconds,
        row=ROW_SECONDS + row + reduced,
        prompt_token=2 * shape.layers * shape.layer_weights / flops + reduced,
    )


@dataclass(frozen=True)
class Layout:
    """Cards divided into equal engines, with a number of concurrent sequences.

    running   sequences that run; others wait, because KV memory has no room
    pace      tokens per second of a sequence that runs
    total     tokens per second of all
    """

    engines: int
    cards_each: int
    running: int
    pace: float
    total: float


def layouts(shape: Shape, card: Card, cards: int, *, sequences: int, context: int) -> list[Layout]:
    """Return the layouts of *cards* cards, from one engine over all to one for each card, where it fits."""
    found = []
    each = cards
    while each >= 1:
        made = engine(shape, card, context=context, cards=each, most=1024)
        engines = cards // each
        running = min(math.ceil(sequences / engines), made.slots)
        if running:
            seconds = made.seconds(running, 0)
            total = min(running * engines, sequences)
            found.append(Layout(engines, each, total, 1 / seconds, total / seconds))
        each //= 2
    return found


LAYOUTS = ((MODELS[1], CARDS[1]), (MODELS[2], CARDS[1]), (MODELS[1], CARDS[0]))


def markdown(*, context: int = 2048) -> str:
    """Return the table of models and cards. A sequence at its end has twice the mean *context*."""
    head = [
        "| model | weights, GB | KV memory of a token, kB | cards | KV memory: tokens "
        f"| sequences of {2 * context:,} tokens | decode, 1 / 32 sequences: tokens/s each "
        "| prefill, tokens/s |",
        "|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    return "\n".join([*head, *(_row(shape, card, context) for shape in MODELS for card in CARDS)]) + "\n"


def layouts_markdown(*, context: int = 2048) -> str:
    """Return a table of layouts for each of LAYOUTS."""
    return "\n\n".join(_layout_table(shape, card, 8, context) for shape, card in LAYOUTS) + "\n"


def _row(shape: Shape, card: Card, context: int) -> str:
    cards = fewest_cards(shape, card, 2 * context)
    made = engine(shape, card, context=context, cards=cards)
    tokens = kv_tokens(shape, card, cards)
    name = card.name if cards == 1 else f"{cards} x {card.name}"
    cells = (
        *(shape.name, f"{weight_bytes(shape) / 1e9:.1f}", f"{kv_bytes(shape) / 1e3:.0f}", name),
        *(f"{tokens:,}", f"{tokens // (2 * context):,}"),
        f"{1 / made.seconds(1, 0):.0f} / {_pace(made, 32)}",
        f"{1 / made.prompt_token:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _pace(made: Engine, rows: int) -> str:
    return f"{1 / made.seconds(rows, 0):.0f}" if rows <= made.slots else "-"


def _layout_table(shape: Shape, card: Card, cards: int, context: int) -> str:
    columns: Sequence[int] = (8, 64, 512)
    lines = [
        f"{shape.name} on {cards} x {card.name}, {context:,} tokens of context:",
        "",
        "| engines x cards | KV memory: tokens in all | "
        + " | ".join(f"{count} sequences: tokens/s each, in all" for count in columns)
        + " |",
        "|---|--:|" + "--:|" * len(columns),
    ]
    by_layout: dict[tuple[int, int], list[str]] = {}
    for count in columns:
        for layout in layouts(shape, card, cards, sequences=count, context=context):
            waits = f", {count - layout.running} wait" if layout.running < count else ""
            by_layout.setdefault((layout.engines, layout.cards_each), []).append(
                f"{layout.pace:.0f}, {layout.total:,.0f}{waits}"
            )
    for (engines, each), cells in by_layout.items():
        tokens = engines * kv_tokens(shape, card, each)
        lines.append(f"| {engines} x {each} | {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)
