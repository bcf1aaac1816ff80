"""Join consecutive parts of an answer, in place."""

from __future__ import annotations

from headrace.v1 import generation_pb2 as pb


def joined(before: pb.GenerateResponse, response: pb.GenerateResponse, most: int) -> bool:
    """Append a delta to the one before it, if both are deltas with tokens. Returns success.

    most   tokens of the result

    The details of tokens are left to the caller.
    """
    if not (before.HasField("delta") and response.HasField("delta")):
        return False
    delta, more = before.delta, response.delta
    count, added = delta.token_count, more.token_count
    if not count or not added or count + added > most or more.offset != delta.offset + count:
        return False  # a delta without tokens contains what was held back until the end
    delta.token_count = count + added
    delta.text += more.text
    delta.token_ids.extend(more.token_ids)
    delta.logprobs.extend(more.logprobs)
    if more.reasoning:
        delta.reasoning += more.reasoning
    calls = delta.tool_calls
    for part in more.tool_calls:
        if calls and not part.id and calls[-1].index == part.index:
            calls[-1].arguments += part.arguments
        else:
            calls.append(part)
    return True
