"""Track one answer over all batchers that work on it, and turn each batcher's events into the caller's."""

from __future__ import annotations

import math
import time

from opentelemetry import trace

from headrace import attributes, errors
from headrace.metrics import catalogue
from headrace.progress import Progress, Responses, route_change
from headrace.router.answering import replies
from headrace.router.state.batcher_peer import BatcherPeer
from headrace.router.state.peer_reports import total
from headrace.v1 import generation_pb2 as pb


class ForwardedAnswer(Progress):
    """The state of one answer that the next batcher needs to resume it.

    Each event is validated, and rewritten with the router's names, when it is taken.

    accepted_here   whether the batcher of this attempt has accepted the request
    lost            why the answer left the previous batcher; None if it has not left one
    losses          batchers that were lost with it; one that drained does not count
    attempts        attempts that were lost, for any reason
    fruitless       the last of these in a row that brought no token

    tier     the router's name of the tier that answers
    """

    def __init__(self, request: pb.GenerateRequest, tier: str) -> None:
        super().__init__(request)
        self._tier = tier
        sampling = request.sampling
        self._max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else math.inf
        self._top = sampling.top_logprobs if sampling.HasField("top_logprobs") else None
        self._wants_prompt = sampling.HasField("prompt_logprobs") and not self.ids
        self._calls = None if self.ids else 0  # begun; None: the caller knows
        self._peer_is_router = False  # of this attempt
        self.accepted_here = False
        self.lost: errors.HeadraceError | None = None
        self.losses = 0
        self.attempts = 0
        self.fruitless = 0
        self._position_before = self.position  # when this attempt began
        self._reports_changes = request.stream.include_route_changes
        self._batcher = self._last_batcher = ""
        self._replayed_before = 0  # by attempts that were lost
        self._replayed = 0  # by this one
        self._began = time.monotonic()
        self._first_token: float | None = None
        self._last_token = 0.0

    def request(self) -> pb.GenerateRequest:
        """Return the request for the next batcher."""
        request = super().request()
        request.stream.include_route_changes = True
        # The router has chosen the tier, and a router behind it has other names for its tiers.
        for field in ("tier", "min_tier", "max_tier"):
            request.routing.ClearField(field)
        if self._peer_is_router and self.accepted is not None:
            request.routing.model = self.accepted.model  # only the model that began can resume
        return request

    def begin_attempt(self, batcher: BatcherPeer) -> None:
        """Start the next attempt, at *batcher*."""
        self._batcher = batcher.address
        self._position_before = self.position
        self._peer_is_router = batcher.router
        self._replayed = len(self.ids)

    def take(self, response: pb.GenerateResponse) -> Responses:
        """Take an event of the batcher; return the events for the caller.

        Raises as `Progress` does, and BatcherLost for an event that the contract does not allow here.
        """
        event = response.WhichOneof("event")
        if (event == "accepted") == self.accepted_here:
            raise errors.BatcherLost(
                "the batcher accepted the request twice"
                if self.accepted_here
                else f"the batcher began its answer with {event or 'nothing'}, not with `accepted`"
            )
        if event == "delta":
            if self._ending is not None:
                raise errors.BatcherLost("the batcher sent a delta after the end of the answer's text")
            delta = response.delta
            if self.text_only:
                replies.check_text(delta, self.tokens, self._top)
            else:
                replies.check_delta(delta, len(self.ids), self._max_tokens)
                if self._top is not None:
                    replies.check_tokens(delta, self._top)
            if delta.tool_calls:
                self._check_calls(delta)
            if delta.token_count:
                if not self.tokens:  # in every attempt until a token is delivered
                    self._check_prompt()
                self._last_token = time.monotonic()
                self._first_token = self._first_token or self._last_token
            return self.add(response)
        if event == "accepted":
            return self._accept(response)
        if event == "route_change":
            replies.check_change(response.route_change, self._tier if self._peer_is_router else "")
            self.attempt = max(self.attempt, response.route_change.attempt)
            self._replayed += len(self.ids)
            return (response,) if self._reports_changes else ()
        if event == "finish":
            self._check_prompt()
            replies.check_finish(response.finish, self.tokens, estimated=self.text_only)
            self._complete(response.finish)
            return self.finish(response)
        if event == "prompt_tokens":
            return self._take_prompt(response)
        return (response,)  # an event of a newer batcher, which callers ignore if they do not know it

    def lose(self, why: errors.HeadraceError) -> None:
        """Record that the batcher of this attempt is lost."""
        self.restart()
        self.lost = why
        self.losses += not isinstance(why, errors.Draining)
        self.attempts += 1
        # That a batcher accepts the request is not enough.
        self.fruitless = 0 if self.position[1:] > self._position_before[1:] else self.fruitless + 1
        self.accepted_here = False
        self._last_batcher = self._batcher
        self._replayed_before += self._replayed

    def _accept(self, response: pb.GenerateResponse) -> Responses:
        replies.accept(response.accepted, self._asked, self._tier)
        first = self.accept(response.accepted)
        self.accepted_here = True
        if first or self.lost is None:
            return (response,)
        reason = self.lost.reason
        catalogue.FAILOVERS.of(tier=self._tier, error=reason).add()
        trace.get_current_span().add_event(
            attributes.EVENT_FAILOVER, {attributes.ERROR_TYPE: reason, attributes.BATCHER: self._batcher}
        )
        if not self._reports_changes:
            return ()
        return (route_change(self._last_batcher, self._batcher, reason, self.attempt),)

    def _take_prompt(self, response: pb.GenerateResponse) -> Responses:
        if self.accepted is None or not self._wants_prompt or self.ids:
            raise errors.BatcherLost("the batcher sent tokens of the prompt that were not requested")
        most = self._asked.sampling.prompt_logprobs
        replies.check_prompt(response.prompt_tokens, self.accepted.prompt_tokens, most)
        return self.add_prompt(response)

    def _check_calls(self, delta: pb.Delta) -> None:
        if not self._asked.chat.tools:
            raise errors.BatcherLost("the batcher sent a call of a tool, and the request has no tools")
        begun = replies.check_calls(delta, self._calls)
        # Others are repeated by the next attempt if the `finish` is lost.
        if delta.token_count or self.text_only:
            self._calls = begun

    def _check_prompt(self) -> None:
        """Check that the details of the prompt, if requested, came before the first token."""
        if not self._wants_prompt or self.accepted is None:
            return
        if not self.prompt:
            raise replies.unsupported("prompt_logprobs")
        if self.prompt == self.accepted.prompt_tokens:
            return
        raise errors.BatcherLost(
            f"the batcher sent {self.prompt} of {self.accepted.prompt_tokens} tokens of the prompt before "
            "the answer"
        )

    def _complete(self, finish: pb.Finish) -> None:
        """Make usage and timing those of the whole answer; the last batcher knows only its own part."""
        if self.lost is None:
            return
        finish.usage.replayed_tokens = total([finish.usage.replayed_tokens, self._replayed_before])
        timing = finish.timing
        timing.total.FromNanoseconds(int((time.monotonic() - self._began) * 1e9))
        if self._first_token is not None:
            timing.first_token.FromNanoseconds(int((self._first_token - self._began) * 1e9))
            timing.decode.FromNanoseconds(int((self._last_token - self._first_token) * 1e9))
