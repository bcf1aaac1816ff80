"""Choose the sizes of steps that are captured as CUDA graphs, and the size for a step.

Launching a step's hundreds of kernels one by one takes the host longer than the device computes them. A graph
launches them at once, but its sizes are fixed: a smaller step is padded. `cuda.GraphPool` captures.
"""

from __future__ import annotations

from bisect import bisect_left

from headrace.worker.engine.gpu.step_inputs import StepShape

# Tokens of the smallest mixed step, because a step with fewer takes as long, and the least difference of two
# sizes: matrix products compute tiles of about so many rows.
_MIXED_STEP = 128


class Ladder:
    """The sizes of steps that one engine computes.

    max_running   most rows of a step
    step_tokens   most tokens of a step
    tile          tokens of a query tile in mixed steps, see `StepShape`

    shapes   all of them, the largest first, as `GraphPool` needs them
    """

    def __init__(self, *, max_running: int, step_tokens: int, tile: int) -> None:
        self._tile = tile
        self._max_running = max_running
        self._decodes = [StepShape(rows, rows, 1) for rows in decode_sizes(max_running)]
        self._mixed = [
            StepShape(tokens, min(tokens, max_running), tile)
            for tokens in mixed_sizes(max(step_tokens, max_running))
        ]
        # A query tile of one token makes some of them equal.
        self.shapes = list(dict.fromkeys([*reversed(self._mixed), *reversed(self._decodes)]))

    def choose(self, rows: int, tokens: int) -> StepShape:
        """Return the smallest shape that holds a step; exactly its own if none does."""
        shapes, size = (self._decodes, rows) if rows == tokens else (self._mixed, tokens)
        index = bisect_left(shapes, size, key=lambda shape: shape.tokens)
        while index < len(shapes) and shapes[index].rows < rows:
            index += 1
        return shapes[index] if index < len(shapes) else self.exact(rows, tokens)

    def exact(self, rows: int, tokens: int) -> StepShape:
        """Return the shape of a step without padding."""
        return StepShape(tokens, rows, 1 if rows == tokens else self._tile)


def decode_sizes(most: int) -> list[int]:
    """Return numbers of rows up to *most*: padding is at most 7 rows up to 64 rows, and an eighth above."""
    sizes = [size for size in (1, 2, 4, *range(8, 64, 8)) if size < most]
    size = 64
    while size < most:
        sizes.append(size)
        size += max(size // 8 // 8 * 8, 8)
    return [*sizes, most]


def mixed_sizes(most: int) -> list[int]:
    """Return numbers of tokens up to *most*: multiples of 128, above 1,024 with gaps of at most a quarter.

    The time of a step with many tokens is that of its matrix products, which compute padding too.
    """
    sizes, size = [], _MIXED_STEP
    while size < most:
        sizes.append(size)
        power_of_2 = 1 << (size.bit_length() - 1)
        size += max(power_of_2 // 4, _MIXED_STEP)
    return [*sizes, most]
