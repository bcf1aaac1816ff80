"""Keep the tokens of an answer, so that it can be resumed on another server when its stream is lost.

The client does so when it loses its router, and the router when it loses a batcher. The next token depends on
model, prompt, seed and the tokens so far, so a request for the rest contains these. An answer of text alone,
which a service outside of the mesh computes, has no tokens to continue from: it ends when its stream is lost.
"""

from __future__ import annotations

import secrets
import uuid
from typing import TypeAlias

from headrace import errors
from headrace.v1 import generation_pb2 as pb

Responses: TypeAlias = tuple[pb.GenerateResponse, ...]  # what the caller receives for one event


class Progress:
    """The state of one answer, across all streams that carry it.

    request    the original request, with the seed set
    ids        the tokens so far, with those that came with the request; an answer of text alone has none
    prompt     tokens of the prompt whose details were received
    attempt    of the current stream, as in `headrace.v1.Resume`
    accepted   the first event, once it was received
    text_only  whether the answer is text alone, as `accepted` says
    resumable  whether another stream can continue it: not once a part of a text alone was received
    finished   whether the last event was received
    """

    def __init__(self, request: pb.GenerateRequest) -> None:
        self.ids = list(request.resume.token_ids)
        self.prompt = 0
        self.attempt = request.resume.attempt
        self.accepted: pb.Accepted | None = None
        self.text_only = False
        self.resumable = True
        self.finished = False
        self._estimated = 0  # tokens of a text alone
        self._asked = request
        self._with_ids = request.stream.include_token_ids
        self._ending: pb.GenerateResponse | None = None

    def request(self) -> pb.GenerateRequest:
        """Return the request for the answer, or for the rest of it."""
        request = pb.GenerateRequest()
        request.CopyFrom(self._asked)
        request.stream.include_token_ids = True
        if self.ids or self.attempt:
            request.resume.attempt = self.attempt
            del request.resume.token_ids[:]
            request.resume.token_ids.extend(self.ids)
        if self.ids:  # the details of the prompt came before the first token
            request.sampling.ClearField("prompt_logprobs")
        return request

    @property
    def tokens(self) -> int:
        """Tokens so far, with those that came with the request; of a text alone an estimate."""
        return self._estimated or len(self.ids)

    @property
    def position(self) -> tuple[bool, int, int]:
        """How much of the answer is there: it changes with each stream that brings something."""
        return self.accepted is not None, self.prompt, self.tokens

    def accept(self, accepted: pb.Accepted) -> bool:
        """Return whether this is the first `accepted`.

        Raises NoWorkers for another model, and BatcherLost for text alone where tokens are expected, or the
        reverse.
        """
        if accepted.text_only and self.ids:
            raise errors.BatcherLost("the stream continued an answer that has token ids with text alone")
        if self.accepted is None:
            self.accepted = accepted
            self.text_only = accepted.text_only
            return True
        if accepted.model != self.accepted.model:
            raise errors.NoWorkers(
                f"the answer was begun by model {self.accepted.model!r}, which is not served any more, and "
                f"{accepted.model!r} cannot continue it"
            )
        if accepted.text_only != self.text_only:
            now, before = ("text alone", "tokens") if accepted.text_only else ("tokens", "text alone")
            raise errors.BatcherLost(f"the stream continued an answer of {before} with {now}")
        return False

    def add(self, response: pb.GenerateResponse) -> Responses:
        """Process a delta, and remove its token ids unless the caller requested them.

        A delta without tokens contains text or parts of calls that were held back until the end. It is kept
        until the `finish` that follows: if that is lost, the next stream repeats both. A text alone is not
        repeated, so nothing of it is kept.

        Raises BatcherLost if the tokens do not start at the next offset, or a text alone has token ids.
        """
        if self.text_only:
            return self._add_text(response)
        delta = response.delta
        ids = delta.token_ids[:]  # a list, which extends another one three times as fast
        if delta.offset != len(self.ids) or len(ids) != delta.token_count:
            raise errors.BatcherLost(
                f"the stream continued at token {delta.offset} with {len(ids)} ids for "
                f"{delta.token_count} tokens, expected at {len(self.ids)}"
            )
        if not ids:
            self._ending = response
            return ()
        self.ids.extend(ids)
        if not self._with_ids:
            delta.ClearField("token_ids")
        return (response,)

    def _add_text(self, response: pb.GenerateResponse) -> Responses:
        """Process a delta of a text alone."""
        delta = response.delta
        if delta.offset != self._estimated or delta.token_ids:
            raise errors.BatcherLost(
                f"the stream continued a text alone at token {delta.offset} with {len(delta.token_ids)} ids, "
                f"expected at {self._estimated} without ids"
            )
        self._estimated += delta.token_count
        self.resumable = False
        return (response,)

    def add_prompt(self, response: pb.GenerateResponse) -> Responses:
        """Process a part of the prompt's details, and remove what an earlier stream has delivered.

        Raises BatcherLost if tokens before it are missing.
        """
        part = response.prompt_tokens
        known = self.prompt - part.offset
        if known < 0:
            raise errors.BatcherLost(
                f"the stream continued at prompt token {part.offset}, expected at {self.prompt}"
            )
        if known >= len(part.tokens):
            return ()
        del part.tokens[:known]
        part.offset = self.prompt
        self.prompt += len(part.tokens)
        return (response,)

    def finish(self, response: pb.GenerateResponse) -> Responses:
        """Process the last event."""
        self.finished = True
        return (response,) if self._ending is None else (self._ending, response)

    def broken_off(self, error: errors.HeadraceError) -> errors.HeadraceError:
        """Return the caller's error if *error* ended the stream of an answer that is not `resumable`."""
        lost = isinstance(error, errors.Unavailable | errors.RequestCancelled)
        if not lost or isinstance(error, errors.UpstreamLost):
            return error
        return errors.UpstreamLost(
            f"the answer broke off after about {self.tokens} tokens, and cannot be resumed because a service "
            f"outside of the mesh computes it: {error}; send the request again",
            cause=error.reason,
        )

    def restart(self) -> None:
        """Prepare for the next stream after this one was lost."""
        self._ending = None
        self.attempt += 1


def route_change(origin: str, target: str, reason: str, attempt: int) -> pb.GenerateResponse:
    """Return the event that reports the move of an answer."""
    change = pb.RouteChange(to=target, reason=reason, attempt=attempt)
    setattr(change, "from", origin)  # `from` is a keyword in Python
    return pb.GenerateResponse(route_change=change)


class Answer(Progress):
    """An answer as the caller reads it: one stream, made of one or several streams from servers."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        complete = pb.GenerateRequest()
        complete.CopyFrom(request)
        # A seed or id that a server draws is lost with it.
        if not complete.sampling.HasField("seed"):
            complete.sampling.seed = secrets.randbits(64)
        complete.request_id = complete.request_id or str(uuid.uuid4())
        super().__init__(complete)
        self._lost: errors.HeadraceError | None = None

    def request(self) -> pb.GenerateRequest:
        """Return the request for the answer, or for the rest of it."""
        request = super().request()
        if self.accepted is not None:
            # The token ids so far belong to this model.
            request.routing.tier = self.accepted.tier
            request.routing.model = self.accepted.model
        return request

    def take(self, response: pb.GenerateResponse) -> Responses:
        """Process an event and return what the caller receives. Raises the errors of `Progress`."""
        event = response.WhichOneof("event")
        if event == "delta":
            return self.add(response)
        if event == "finish":
            return self.finish(response)
        if event == "prompt_tokens":
            return self.add_prompt(response)
        if event == "route_change":
            self.attempt = max(self.attempt, response.route_change.attempt)
        elif event == "accepted" and not self.accept(response.accepted):
            if not self._asked.stream.include_route_changes or self._lost is None:
                return ()
            return (route_change("", "", self._lost.reason, self.attempt),)
        return (response,)

    def lose(self, error: errors.HeadraceError) -> None:
        """Prepare for the next stream after *error* ended this one."""
        self.restart()
        self._lost = error
