"""Make the sequences whose prefill and decode steps are measured."""

from __future__ import annotations

import random

from benchmarks.gpu import engines
from benchmarks.gpu.report import Options
from benchmarks.gpu.shapes import Shape

CONTEXT, ROOM = 1024, 256
_TINY_CONTEXT, _TINY_ROOM = 16, 16


def filled(
    shape: Shape, options: Options, *, exact: bool = False
) -> tuple[engines.Held, engines.Sequences, float]:
    """Return the engine, as many sequences of CONTEXT tokens as run at a time, and the time of the prefill.

    The time is 0 if they were computed before.
    """
    held = engines.held(shape, options, exact=exact)
    if held.sequences is not None:
        return held, held.sequences, 0.0
    context, room = (_TINY_CONTEXT, _TINY_ROOM) if options.rehearse else (CONTEXT, ROOM)
    drawn = random.Random(2)
    sizes = engines.sizes(options)
    prompts = [
        [drawn.randrange(shape.vocabulary - 1) for _ in range(context)] for _ in range(sizes.max_running)
    ]
    # Another one first: what the first step does once is not part of the measurement.
    engines.Sequences(held.engine, prompts[:2], room=room).prefill(sizes.step_tokens)
    held.sequences = engines.Sequences(held.engine, prompts, room=room)
    return held, held.sequences, held.sequences.prefill(sizes.step_tokens)
