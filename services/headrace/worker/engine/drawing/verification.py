"""Sample the tokens of rows with drafts: verify which guesses are right.

A token is sampled from the logits after the ids before it, exactly as plain decoding samples it later. A
guess is right if it is that token; then the next one is sampled as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from headrace.worker.engine.interface import Fault, Row, SamplingParams, Token

Sample = Callable[[torch.Tensor, Sequence[Row]], list[Token | Fault]]  # see `Sampler.sample`


def sample_rows(sample: Sample, logits: torch.Tensor, rows: Sequence[Row]) -> list[Token | Fault]:
    """Sample all tokens of rows of which some have drafts.

    logits   [sampled, vocabulary], see `FlatStep.sampling`

    Returns a result per row; the tokens after the first are in its `Token.more`.
    """
    if not any(row.draft for row in rows):
        return sample(logits, rows)
    extended = [_after_each_guess(row) for row in rows]
    # What a row may sample depends on the tokens before it if it has a grammar or penalties. Its next token
    # is sampled only once those are known, so that what the sampler keeps of a row is never ahead of it.
    tokens: list[list[Token | Fault]] = [[] for _ in rows]
    lines, begin = [], 0
    for own in extended:
        lines.append(range(begin, begin + len(own)))
        begin += len(own)
    due = list(range(len(rows)))
    while due:
        batch = [(i, place) for i in due for place in _sampled_next(extended[i], len(tokens[i]))]
        chosen = logits[[lines[i][place] for i, place in batch]]
        sampled = sample(chosen, [extended[i][place] for i, place in batch])
        for (i, _), token in zip(batch, sampled, strict=True):
            tokens[i].append(token)
        due = [i for i in due if _right(rows[i], tokens[i]) == len(tokens[i]) < len(extended[i])]
    return [_joined(row, own) for row, own in zip(rows, tokens, strict=True)]


def _after_each_guess(row: Row) -> list[Row]:
    """Return the row itself, and as it would be after each of its guesses."""
    if not row.draft:
        return [row]
    ids = [*row.ids[: row.stop], *row.draft]
    return [
        Row(row.blocks, row.start, row.stop + i, ids, row.prompt, True, row.params, row.memo)
        for i in range(len(row.draft) + 1)
    ]


def _sampled_next(extended: Sequence[Row], known: int) -> range:
    """Return the places at which a row is sampled next, after *known* tokens."""
    return range(known, known + 1 if _depends_on_tokens(extended[0].params) else len(extended))


def _depends_on_tokens(params: SamplingParams) -> bool:
    return bool(
        params.grammar
        or params.repetition_penalty != 1
        or params.frequency_penalty
        or params.presence_penalty
    )


def _right(row: Row, tokens: Sequence[Token | Fault]) -> int:
    """Return how many guesses of a row's draft are right."""
    for count, (token, guess) in enumerate(zip(tokens, row.draft, strict=False)):
        if not isinstance(token, Token) or token.id != guess:
            return count
    return min(len(tokens), len(row.draft))


def _joined(row: Row, tokens: Sequence[Token | Fault]) -> Token | Fault:
    first = tokens[0]
    if isinstance(first, Token) and row.draft:
        following = tokens[1 : _right(row, tokens) + 1]
        # A place that cannot be sampled is computed again, as the sequence's next token.
        first.more = [token for token in following if isinstance(token, Token)]
    return first
