"""Sample one token per row from logits, for all rows of a step at once and independently of each other.

The filters have the semantics of transformers' logits processors, and apply in their order: logit bias,
repetition penalty, frequency and presence penalties (as OpenAI's API defines them), min_tokens, temperature,
top-k, top-p, min-p. `noise` supplies the randomness. A row's token depends on its logits, ids and params,
never on the other rows: all sums below are along single rows, in batch-invariant kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.worker.engine.edits import Edits, Ids
from headrace.worker.engine.gpu.cuda import Fetch, to_device
from headrace.worker.engine.interface import Fault, Row, Token
from headrace.worker.engine.noise import gumbel, noise_key

log = logging.getLogger(__name__)

_UNSAMPLED = Fault("the sequence's next token cannot be sampled; see the worker's log")

# Filters examine this many of the likeliest tokens first, and all tokens if those do not suffice.
CANDIDATES = 1024


class Drawing:
    """Tokens that are being sampled: on CUDA the kernels are queued, and not yet awaited.

    rows       the rows to sample
    table      the results, [4, rows] float64: ids, whether the logits were finite, log-probabilities, and
               whether the likeliest tokens sufficed for the filters
    scores     [rows, vocabulary], for rows where they did not
    faults     of rows whose parameters cannot be applied, by index; the samples of these rows are ignored
    """

    def __init__(
        self,
        sampler: Sampler,
        rows: Sequence[Row],
        logits: torch.Tensor,
        scores: torch.Tensor,
        table: Fetch,
        faults: Mapping[int, Fault],
    ) -> None:
        self._sampler = sampler
        self._rows = rows
        self._logits = logits
        self._scores = scores
        self._table = table
        self._faults = faults

    def tokens(self) -> list[Token | Fault]:
        """Wait for the tokens. One entry per row: a Fault if its logits are not finite."""
        ids, finite, logprobs, settled = self._table.wait().tolist()
        return [
            self._faults[index]
            if index in self._faults
            else self._sampler.draw_whole(row, self._logits[index], self._scores[index])
            if good and not done
            else _token(row, int(token), good, logprob)
            for index, (row, token, good, logprob, done) in enumerate(
                zip(self._rows, ids, finite, logprobs, settled, strict=True)
            )
        ]


class SeparateDrawings:
    """Rows of a step that are sampled one by one, because one of them cannot be sampled."""

    def __init__(self, drawings: Sequence[Drawing | Fault]) -> None:
        self._drawings = drawings

    def tokens(self) -> list[Token | Fault]:
        """Wait for the tokens. One entry per row."""
        return [one if isinstance(one, Fault) else _single(one.tokens) for one in self._drawings]


def _single(tokens: Callable[[], list[Token | Fault]]) -> Token | Fault:
    try:
        return tokens()[0]
    except Exception:
        return _UNSAMPLED


def _token(row: Row, token: int, finite: float, logprob: float) -> Token | Fault:
    if not finite:
        return Fault("the model's logits are not finite")
    return Token(token, logprob if row.params.logprobs else None)


class Sampler:
    """Samples tokens for one model.

    eos_ids   ids that `min_tokens` bans
    """

    def __init__(self, eos_ids: frozenset[int], device: torch.device) -> None:
        self._eos_ids = sorted(eos_ids)
        self._device = device

    def sample(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[Token | Fault]:
        """Sample the token at `row.stop` for each row, and wait for the results; see `start`."""
        return self.start(logits, rows).tokens()

    def start(self, logits: torch.Tensor, rows: Sequence[Row]) -> Drawing | SeparateDrawings:
        """Begin to sample the token at `row.stop` for each row, without waiting for the device.

        logits   [rows, vocabulary], any float type; not modified. Must not change until the tokens are
                 returned

        Log-probabilities are of the model's own distribution, before temperature, filters and penalties.
        A row that cannot be sampled, whatever its parameters, gets a Fault; other rows are not affected.
        """
        try:
            return self._start(logits, rows)
        except Exception:
            log.exception("a step cannot be sampled as a whole", extra={"rows": len(rows)})
        drawings: list[Drawing | Fault] = []
        for index, row in enumerate(rows):
            try:
                drawings.append(self._start(logits[index : index + 1], [row]))
            except Exception:
                drawings.append(_UNSAMPLED)
        return SeparateDrawings(drawings)

    def _start(self, logits: torch.Tensor, rows: Sequence[Row]) -> Drawing:
        scores, faults = self._edit(logits, rows)
        best, ids = scores.max(dim=-1)
        settled = torch.ones(len(rows), dtype=torch.bool, device=self._device)
        warm = [i for i, row in enumerate(rows) if row.params.temperature > 0]
        if warm:
            chosen = self._index(warm)
            whole = scores if len(warm) == len(rows) else scores[chosen]
            ids[chosen], settled[chosen] = self._draw(whole.float(), [rows[i] for i in warm], CANDIDATES)
        logprobs = torch.zeros(len(rows), dtype=torch.float64, device=self._device)
        asked = [i for i, row in enumerate(rows) if row.params.logprobs]
        if asked:
            chosen = self._index(asked)
            own = torch.log_softmax(logits[chosen].float(), dim=-1)
            logprobs[chosen] = own.gather(1, ids[chosen, None])[:, 0].double()
        # One transfer for all four: float64 represents every id exactly.
        table = torch.stack((ids.double(), torch.isfinite(best).double(), logprobs, settled.double()))
        return Drawing(self, rows, logits, scores, Fetch(table), faults)

    def draw_whole(self, row: Row, logits: torch.Tensor, scores: torch.Tensor) -> Token:
        """Sample a row whose likeliest tokens do not suffice for its filters, from all tokens."""
        ids, _ = self._draw(scores[None].float(), [row], scores.shape[0])
        token = int(ids[0])
        if not row.params.logprobs:
            return Token(token)
        return Token(token, float(torch.log_softmax(logits.float(), dim=-1)[token]))

    def _edit(self, logits: torch.Tensor, rows: Sequence[Row]) -> tuple[torch.Tensor, dict[int, Fault]]:
        """Apply bias, penalties and min_tokens. Returns *logits* itself if no row has any.

        Also returns the faults of rows whose parameters cannot be applied.
        """
        faults: dict[int, Fault] = {}
        edits: dict[int, Edits] = {}
        for index, row in enumerate(rows):
            try:
                if (own := self._edits(row, logits.shape[1])) is not None:
                    edits[index] = own
            except (ValueError, OverflowError, TypeError) as error:
                faults[index] = Fault(f"the sequence's parameters cannot be applied: {error}")
        return (self._edited(logits, rows, edits) if edits else logits), faults

    def _edited(self, logits: torch.Tensor, rows: Sequence[Row], edits: Mapping[int, Edits]) -> torch.Tensor:
        """Return a copy of *logits* with the edits of rows, given by index, applied."""
        scores = logits.to(torch.float32, copy=True)
        flat, width = scores.view(-1), scores.shape[1]
        if biased := [i for i, own in edits.items() if len(own.bias_ids)]:
            places = self._places(width, {i: edits[i].bias_ids for i in biased})
            flat.scatter_add_(0, places, self._array(np.concatenate([edits[i].biases for i in biased])))
        if repeated := {i: own.seen.ids for i, own in edits.items() if own.seen is not None}:
            places = self._places(width, repeated)
            penalties = [np.float32(rows[i].params.repetition_penalty) for i in repeated]
            penalty = self._array(np.repeat(penalties, [len(ids) for ids in repeated.values()]))
            seen = flat.gather(0, places)
            flat.scatter_(0, places, torch.where(seen < 0, seen * penalty, seen / penalty))
        if counted := {i: own.answered for i, own in edits.items() if own.answered is not None}:
            places = self._places(width, {i: tally.ids for i, tally in counted.items()})
            added = [
                np.float32(-rows[i].params.frequency_penalty) * tally.counts
                - np.float32(rows[i].params.presence_penalty)
                for i, tally in counted.items()
            ]
            flat.scatter_add_(0, places, self._array(np.concatenate(added)))
        if banned := {
            i: own.endings
            for i, own in edits.items()
            if rows[i].stop - rows[i].prompt < rows[i].params.min_tokens and len(own.endings)
        }:
            flat[self._places(width, banned)] = float("-inf")
        return scores

    def _edits(self, row: Row, vocabulary: int) -> Edits | None:
        """Return a row's edits, updated; None if it has none. Raises ValueError, see `Edits`."""
        params = row.params
        if not (
            params.logit_bias
            or params.repetition_penalty != 1
            or params.frequency_penalty
            or params.presence_penalty
            or row.stop - row.prompt < params.min_tokens
        ):
            return None
        edits: Edits | None = row.memo.kept
        if edits is None or edits.known > row.stop:
            edits = row.memo.kept = Edits(row, self._eos_ids, vocabulary)
        edits.advance(row)
        return edits

    def _places(self, width: int, ids: Mapping[int, Ids]) -> torch.Tensor:
        """Return the indices of the rows' ids in the flat scores; *width* is the length of a row."""
        return self._array(np.concatenate([own + index * width for index, own in ids.items()]))

    def _draw(
        self, scores: torch.Tensor, rows: Sequence[Row], size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample one id per row from float32 scores, before temperature.

        Filters examine the *size* likeliest tokens. Returns the ids, int64, and whether those sufficed, both
        [rows].
        """
        temperature = self._floats([row.params.temperature for row in rows])[:, None]
        # The maximum is subtracted first, so that no temperature, however small, overflows.
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
        keys = self._tensor([noise_key(row.params.seed, row.stop) for row in rows], torch.int32)
        ids = torch.zeros(len(rows), dtype=torch.int64, device=self._device)
        settled = torch.ones(len(rows), dtype=torch.bool, device=self._device)
        filtered = [
            i for i, row in enumerate(rows) if 0 < row.params.top_k < scores.shape[1] or row.params.top_p < 1
        ]
        free = [i for i in range(len(rows)) if i not in set(filtered)]
        if free:
            chosen = self._index(free)
            floor = self._floats([rows[i].params.min_p for i in free]).log()[:, None]
            every = torch.arange(scores.shape[1], dtype=torch.int32, device=self._device)
            own = scores if len(free) == len(rows) else scores[chosen]
            # The maximum is 0: a token's score is the log of its probability relative to the likeliest one's.
            noisy = gumbel(keys[chosen], every[None]).add_(own).masked_fill_(own < floor, float("-inf"))
            ids[chosen] = noisy.argmax(dim=-1)
        if filtered:
            chosen = self._index(filtered)
            few = min(size, scores.shape[1])
            ids[chosen], settled[chosen] = self._draw_filtered(
                scores[chosen], keys[chosen], [rows[i] for i in filtered], few
            )
        return ids, settled

    def _draw_filtered(
        self, scores: torch.Tensor, keys: torch.Tensor, rows: Sequence[Row], size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample rows with top-k or top-p, from the *size* likeliest tokens.

        Returns the ids, and whether those tokens include all that the filters keep, both [rows].
        """
        whole = torch.log_softmax(scores, dim=-1)
        likely, ids = whole.topk(size, dim=-1)
        limits = [row.params.top_k if 0 < row.params.top_k < scores.shape[1] else 0 for row in rows]
        limit = self._index(limits)[:, None]
        # As in transformers, tokens as likely as the k-th are kept too.
        least = likely.gather(1, (limit - 1).clamp(0, size - 1))
        within = (limit > 0) & ((least > likely[:, -1:]) | (size == scores.shape[1])) & (limit <= size)
        kept = (limit == 0) | (likely >= least)
        shares = torch.log_softmax(likely.masked_fill(~kept, float("-inf")), dim=-1)
        probability = torch.where(limit > 0, shares, likely).exp()
        # Keep tokens until their sum reaches top_p: those with a sum below top_p before them.
        reached = probability.cumsum(dim=-1)
        # Sums may round to more than 1: no bound if all tokens are kept.
        bounds = [row.params.top_p if row.params.top_p < 1 else float("inf") for row in rows]
        top_p = self._floats(bounds)[:, None]
        kept &= reached - probability < top_p
        kept &= probability >= probability[:, :1] * self._floats([r.params.min_p for r in rows])[:, None]
        kept[:, 0] = True
        noisy = (likely + gumbel(keys, ids.int())).masked_fill_(~kept, float("-inf"))
        settled = within | ((limit == 0) & (reached[:, -1:] >= top_p)) | (size == scores.shape[1])
        return ids.gather(1, noisy.argmax(dim=-1, keepdim=True))[:, 0], settled[:, 0]

    def _index(self, values: list[int]) -> torch.Tensor:
        return self._tensor(values, torch.int64)

    def _array(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return to_device(torch.from_numpy(values), self._device)

    def _floats(self, values: list[float]) -> torch.Tensor:
        return self._tensor(values, torch.float32)

    def _tensor(self, values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return to_device(torch.tensor(values, dtype=dtype), self._device)
