"""Split a delta that is too large for one message: upstreams that do not stream send whole answers."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.v1 import generation_pb2 as pb

MAX_CHARACTERS = 64 * 1024  # of each text in a delta
MAX_ENTRIES = 1024  # tokens of a delta, with the most likely ones at each place


def split(delta: pb.Delta, top: int) -> list[pb.Delta]:
    """Return the parts of a delta, without offsets; a list of *delta* itself if it is small.

    Its tokens come first, without text: a text may lag behind its tokens.

    top   the most likely tokens that each token has at most
    """
    tokens = max(MAX_ENTRIES // (1 + top), 1)
    details = max(len(delta.tokens), len(delta.logprobs))
    calls = sum(len(part.arguments) for part in delta.tool_calls)
    if details <= tokens and max(len(delta.text), len(delta.reasoning), calls) <= MAX_CHARACTERS:
        return [delta]
    parts = list(_tokens(delta, tokens) if details else [pb.Delta(token_count=delta.token_count)])
    parts += [pb.Delta(reasoning=piece) for piece in _pieces(delta.reasoning)]
    parts += [pb.Delta(text=piece) for piece in _pieces(delta.text)]
    for call in delta.tool_calls:
        first, *others = _pieces(call.arguments) or [""]
        head = pb.ToolCallDelta(index=call.index, id=call.id, name=call.name, arguments=first)
        parts.append(pb.Delta(tool_calls=[head]))
        for piece in others:
            parts.append(pb.Delta(tool_calls=[pb.ToolCallDelta(index=call.index, arguments=piece)]))
    return parts


def _tokens(delta: pb.Delta, most: int) -> Iterator[pb.Delta]:
    for start in range(0, delta.token_count, most):
        stop = min(start + most, delta.token_count)
        yield pb.Delta(
            token_count=stop - start, logprobs=delta.logprobs[start:stop], tokens=delta.tokens[start:stop]
        )


def _pieces(text: str) -> list[str]:
    return [text[start : start + MAX_CHARACTERS] for start in range(0, len(text), MAX_CHARACTERS)]
