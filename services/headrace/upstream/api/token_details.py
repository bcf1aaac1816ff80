"""Read log-probabilities of tokens, as chat completions and as text completions represent them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from headrace.upstream.api.malformed import Malformed, list_in, object_in, text_in
from headrace.upstream.api.words import valid
from headrace.v1 import generation_pb2 as pb

MAX_TOKENS = 65_536  # in one event
LOWEST = -9999.0  # what the API has for -infinity
_MOST = 0.01  # rounding may bring a log-probability above 0
# A token that is a part of a character, in text completions.
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)", re.I | re.A)


def tokens_of(logprobs: object, most: int) -> list[pb.TokenLogprobs]:
    """Return the tokens in the `logprobs` of a choice; none for null. Raises Malformed.

    most   most likely tokens to return at each place
    """
    if logprobs is None:
        return []
    found = object_in(logprobs, "log-probabilities")
    if "tokens" in found:
        return _bounded(_of_text(found, most))
    content = list_in(found.get("content"), "log-probabilities")
    refusal = list_in(found.get("refusal"), "log-probabilities")
    return _bounded(_of_chat((*content, *refusal), most))


def _of_chat(tokens: tuple[object, ...], most: int) -> Iterator[pb.TokenLogprobs]:
    for each in tokens:
        one = object_in(each, "a token")
        top = list_in(one.get("top_logprobs"), "the most likely tokens")[:most]
        yield pb.TokenLogprobs(
            token=_described(one), top=[_described(object_in(other, "a token")) for other in top]
        )


def _described(token: dict[str, Any]) -> pb.TokenLogprob:
    given = token.get("bytes")
    if given is None:
        text = valid(text_in(token.get("token"), "a token")).encode()
    else:
        try:
            text = bytes(list_in(given, "the bytes of a token"))
        except (TypeError, ValueError):
            raise Malformed("bytes of a token that are not numbers from 0 to 255") from None
    return pb.TokenLogprob(logprob=_logprob(token.get("logprob")), text=text)


def _of_text(found: dict[str, Any], most: int) -> Iterator[pb.TokenLogprobs]:
    tokens = list_in(found["tokens"], "tokens")
    logprobs = list_in(found.get("token_logprobs"), "log-probabilities")
    tops = list_in(found.get("top_logprobs"), "the most likely tokens")
    if len(logprobs) != len(tokens) or len(tops) > len(tokens):
        raise Malformed("log-probabilities that do not match the tokens")
    for token, logprob, top in zip_longest(tokens, logprobs, tops):
        likely = {text: _logprob(value) for text, value in object_in(top or {}, "likely tokens").items()}
        ordered = sorted(likely, key=likely.__getitem__, reverse=True)[:most]
        yield pb.TokenLogprobs(
            token=pb.TokenLogprob(logprob=_logprob(logprob), text=_bytes(text_in(token, "a token"))),
            top=[pb.TokenLogprob(logprob=likely[text], text=_bytes(text)) for text in ordered],
        )


def _bytes(token: str) -> bytes:
    if escaped := _BYTES.fullmatch(token):
        return bytes.fromhex(escaped[1].replace("\\x", ""))
    return valid(token).encode()


def _logprob(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed("a log-probability that is not a number")
    if not value <= _MOST:  # also refuses NaN
        raise Malformed("a log-probability that is not a number of at most 0")
    return float(max(value, LOWEST))


def _bounded(tokens: Iterator[pb.TokenLogprobs]) -> list[pb.TokenLogprobs]:
    read: list[pb.TokenLogprobs] = []
    for token in tokens:
        if len(read) == MAX_TOKENS:
            raise Malformed(f"log-probabilities of more than {MAX_TOKENS} tokens in one event")
        read.append(token)
    return read
