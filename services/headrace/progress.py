"""Keep what has been read of an answer, so that it can be carried on where its stream broke off.

Client and router both do: the client for a router that died, the router for a batcher. What is generated
next is a function of model, prompt, seed and the tokens so far, so asking for the rest takes those.
"""

from __future__ import annotations

from typing import TypeAlias

from headrace import errors
from headrace.v1 import generation_pb2 as pb

Told: TypeAlias = tuple[pb.GenerateResponse, ...]  # what the caller hears


class Progress:
    """One answer, over all streams that it takes.

    request    what was asked, with the seed set
    ids        the tokens so far, those that came with the request included
    attempt    of the stream under way, as in `headrace.v1.Resume`
    accepted   the first event, once it is there
    finished   whether the last event is there
    """

    def __init__(self, request: pb.GenerateRequest) -> None:
        self.ids = list(request.resume.token_ids)
        self.attempt = request.resume.attempt
        self.accepted: pb.Accepted | None = None
        self.finished = False
        self._asked = request
        self._with_ids = request.stream.include_token_ids
        self._ending: pb.GenerateResponse | None = None

    def request(self) -> pb.GenerateRequest:
        """What to ask for: all of the answer, or what is missing of it."""
        request = pb.GenerateRequest()
        request.CopyFrom(self._asked)
        request.stream.include_token_ids = True
        if self.ids or self.attempt:
            request.resume.attempt = self.attempt
            del request.resume.token_ids[:]
            request.resume.token_ids.extend(self.ids)
        return request

    def accept(self, accepted: pb.Accepted) -> bool:
        """Whether the caller is to hear it: the first it is. Raises NoWorkers at another model."""
        if self.accepted is None:
            self.accepted = accepted
            return True
        if accepted.model != self.accepted.model:
            raise errors.NoWorkers(
                f"the answer was begun by model {self.accepted.model!r}, which nobody serves here now: "
                f"{accepted.model!r} would make nonsense of it"
            )
        return False

    def add(self, response: pb.GenerateResponse) -> Told:
        """Take in a delta, and leave its token ids to those who asked for them.

        Text without tokens is what was kept back until the end. It waits here for the `finish` that follows:
        if that is lost, the next stream says both.

        Raises BatcherLost when the tokens do not join what is there: whoever sent them has lost count.
        """
        delta = response.delta
        if delta.offset != len(self.ids) or len(delta.token_ids) != delta.token_count:
            raise errors.BatcherLost(
                f"the stream went on at token {delta.offset} with {len(delta.token_ids)} ids for "
                f"{delta.token_count} tokens, expected at {len(self.ids)}"
            )
        if not delta.token_count:
            self._ending = response
            return ()
        self.ids.extend(delta.token_ids)
        if not self._with_ids:
            del delta.token_ids[:]
        return (response,)

    def finish(self, response: pb.GenerateResponse) -> Told:
        """Take in the last event."""
        self.finished = True
        return (response,) if self._ending is None else (self._ending, response)

    def broke(self) -> None:
        """The stream ended early; another one follows."""
        self._ending = None
        self.attempt += 1


def route_change(origin: str, target: str, reason: str, attempt: int) -> pb.GenerateResponse:
    """The event that says that an answer moved."""
    change = pb.RouteChange(to=target, reason=reason, attempt=attempt)
    setattr(change, "from", origin)  # a keyword of Python's
    return pb.GenerateResponse(route_change=change)
