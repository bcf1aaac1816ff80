"""Represent tokens and their log-probabilities as OpenAI's API does."""

from __future__ import annotations

import math

from headrace.v1 import generation_pb2 as pb

LOWEST = -9999.0  # what the API has for -infinity, which JSON cannot represent

JsonToken = dict[str, object]


def token_text(token: pb.TokenLogprob, *, as_id: bool = False) -> str:
    r"""Return the text of a token; of a part of a character its bytes, such as bytes:\xf0\x9f.

    as_id   return its id instead, as in vLLM: token_id:42
    """
    if as_id:
        return f"token_id:{token.id}"
    try:
        return token.text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.text)


def logprob_of(token: pb.TokenLogprob) -> float:
    """Return the log-probability of a token, within what JSON can represent."""
    value = token.logprob
    return LOWEST if math.isnan(value) or value < LOWEST else value


def chat_token(details: pb.TokenLogprobs, *, as_id: bool = False) -> JsonToken:
    """Return a token of a chat completion: an element of `logprobs.content`."""
    return {
        **_one(details.token, as_id),
        "top_logprobs": [_one(token, as_id) for token in details.top],
    }


def _one(token: pb.TokenLogprob, as_id: bool) -> JsonToken:
    return {
        "token": token_text(token, as_id=as_id),
        "logprob": logprob_of(token),
        "bytes": list(token.text),
    }
