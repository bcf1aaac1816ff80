"""Read the events of an upstream's answer, and return those of the mesh.

Whatever an upstream sends, `AnswerReader` returns deltas that obey the contract, or raises one typed error.
Server-sent events are split into JSON values elsewhere.
"""

from __future__ import annotations

from typing import Any

from headrace import errors
from headrace.quoting import quoted
from headrace.upstream.api.calls import CallReader
from headrace.upstream.api.malformed import Malformed, Unusable, list_in, object_in
from headrace.upstream.api.problems import UNUSABLE, UPSTREAM_STATUS, problem_of_event
from headrace.upstream.api.requests import most_tokens
from headrace.upstream.api.splitting import split
from headrace.upstream.api.terms import Terms, unsupported
from headrace.upstream.api.token_details import tokens_of
from headrace.upstream.api.usage import usage_of
from headrace.upstream.api.words import words_of
from headrace.v1 import generation_pb2 as pb

MAX_CHARACTERS = 16 * 1024 * 1024  # of one answer

# Those of OpenAI's API, and those of other servers that mean the same.
_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "tool_calls": pb.FINISH_REASON_STOP,
    "function_call": pb.FINISH_REASON_STOP,
    "eos": pb.FINISH_REASON_STOP,
    "eos_token": pb.FINISH_REASON_STOP,
    "end_turn": pb.FINISH_REASON_STOP,
    "stop_sequence": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "max_tokens": pb.FINISH_REASON_LENGTH,
}
_FILTERED = "content_filter"


class AnswerReader:
    """Reads one answer.

    begun          whether a part of the answer, or the reason of its end, was read: then `accepted` is due,
                   before the deltas that `read` returned
    finished       whether the reason of its end was read. Usage may follow, so read on until the stream ends
    usage_known    whether the upstream has reported its usage
    tokens         the sum of `token_count` of all deltas
    """

    def __init__(self, request: pb.GenerateRequest, terms: Terms, *, key: str = "") -> None:
        """Start before the first event of the answer to *request*.

        key   the API key, which is removed from messages of the upstream
        """
        sampling = request.sampling
        self.begun = False
        self.finished = False
        self.tokens = 0
        self._key = key
        self._most = most_tokens(request, terms)
        self._stops = frozenset(sampling.stop)
        self._with_logprobs = sampling.logprobs
        self._with_tokens = sampling.HasField("top_logprobs")
        self._top = sampling.top_logprobs
        self._described = False  # whether log-probabilities have arrived
        self._calls = CallReader(request)
        self._characters = 0
        self._usage: pb.Usage | None = None
        self._end = pb.Finish()

    @property
    def usage_known(self) -> bool:
        """Whether the upstream has reported its usage."""
        return self._usage is not None

    def read(self, data: object) -> list[pb.Delta]:
        """Return the deltas for one event: a parsed JSON value of the stream, without "[DONE]".

        Also accepts a whole response, from an upstream that ignores `stream`: it is read as one event, which
        may become several deltas.

        Raises UpstreamLost once the answer has begun. Before that, what `problems.problem_of_event` returns
        for an event that reports an error; NoWorkers for an event that violates OpenAI's API; InvalidSampling
        if the upstream ignores that log-probabilities were requested; InvalidRequest if a filter withheld the
        answer. After an error, the reader is of no more use.
        """
        before = self.tokens
        try:
            event = object_in(data, "an event")
            self._check_error(event)
            self._usage = usage_of(event.get("usage")) or self._usage
            deltas = [
                delta
                for choice in list_in(event.get("choices"), "choices")
                for delta in self._read(object_in(choice, "a choice"))
            ]
        except (Malformed, errors.HeadraceError) as problem:
            self.tokens = before  # nothing of the event is delivered
            if isinstance(problem, errors.HeadraceError):
                raise
            lost = self._lost(f"sent {problem}")
            if isinstance(problem, Unusable):
                lost.fields[UNUSABLE] = "tool_calls"
            raise lost from None
        self.begun = self.begun or self.finished or bool(deltas)
        return deltas

    def finish(self) -> pb.Finish:
        """Return the end of the answer, without timing, once the stream has ended.

        Raises UpstreamLost if the answer has begun and is incomplete, and NoWorkers if it has not begun.
        """
        if not self.finished:
            raise self._lost("ended its answer without a reason")
        self._end.usage.CopyFrom(self._usage or pb.Usage(completion_tokens=self.tokens))
        return self._end

    def _check_error(self, event: dict[str, Any]) -> None:
        """Raise the error that an event reports, if it does."""
        error = event.get("error") or (event if event.get("object") == "error" else None)
        if not error:
            return
        reported = problem_of_event(error, key=self._key)
        if self.begun:
            status = reported.fields[UPSTREAM_STATUS]
            # Without its message, which may quote prompt or answer: this error enters logs and spans.
            lost = self._lost(f"reported an error {status}")
            lost.fields |= reported.fields
            raise lost
        raise reported

    def _read(self, choice: dict[str, Any]) -> list[pb.Delta]:
        if choice.get("index") not in (0, None):
            raise Malformed("a second choice, although one was requested")
        body = choice.get("delta")
        if body is None:
            body = choice.get("message")
        body = {"content": choice.get("text")} if body is None else object_in(body, "a delta")
        text, reasoning = words_of(body)
        parts = body.get("tool_calls")
        if not parts and body.get("function_call"):
            parts = [{"function": body["function_call"]}]
        tokens = tokens_of(choice.get("logprobs"), self._top)
        delta = pb.Delta(text=text, reasoning=reasoning, tool_calls=self._calls.read(parts))
        filled = bool(text or reasoning or delta.tool_calls)
        if self.finished and filled:
            raise Malformed("more of the answer after its end")
        deltas = []
        if filled or (tokens and self._details and not self.finished):
            self._count(delta, tokens)
            deltas.append(delta)
        if not self.finished and (reason := choice.get("finish_reason")):
            self._read_end(reason, choice)
            if self._end.reason == pb.FINISH_REASON_STOP and (rest := self._calls.finish()):
                deltas.append(pb.Delta(tool_calls=rest))
        return [self._placed(each) for delta in deltas for each in split(delta, self._top)]

    @property
    def _details(self) -> bool:
        """Whether log-probabilities were requested."""
        return self._with_logprobs or self._with_tokens

    def _count(self, delta: pb.Delta, tokens: list[pb.TokenLogprobs]) -> None:
        """Set the number of tokens, and their details if they were requested."""
        self._characters += len(delta.text) + len(delta.reasoning)
        self._characters += sum(len(part.arguments) for part in delta.tool_calls)
        if self._characters > MAX_CHARACTERS:
            raise Malformed(f"an answer of more than {MAX_CHARACTERS} characters")
        left = self._most - self.tokens
        if delta.text and not tokens and self._details and not self._described:
            if self._with_tokens or not self.begun:
                raise self._without_details()
            # The thoughts were delivered. A router asks for log-probabilities to judge a draft, and can do
            # without them.
            self._with_logprobs = False
        if not self._details:
            delta.token_count = min(self._estimate(len(tokens)), left)
            return
        self._described = self._described or bool(tokens)
        if len(tokens) > left:
            raise Malformed(f"more tokens than the {self._most} that were requested")
        delta.token_count = len(tokens)
        if self._with_logprobs:
            delta.logprobs.extend(each.token.logprob for each in tokens)
        if self._with_tokens:
            delta.tokens.extend(tokens)

    def _estimate(self, described: int) -> int:
        """Return how many tokens an event with a part of the answer has.

        described   tokens with log-probabilities in it
        """
        if self._usage is not None and self._usage.completion_tokens:  # all tokens so far
            return max(self._usage.completion_tokens - self.tokens, 0)
        return described or 1

    def _placed(self, delta: pb.Delta) -> pb.Delta:
        delta.offset = self.tokens
        self.tokens += delta.token_count
        return delta

    def _read_end(self, reason: object, choice: dict[str, Any]) -> None:
        """Read why the answer ended. *reason* is not empty."""
        if reason == _FILTERED:
            message = "the service behind this tier withheld the answer: its content filter objects to it"
            if self.begun:
                lost = errors.UpstreamLost(f"{message} from here on")
                lost.fields[UNUSABLE] = _FILTERED
                raise lost
            raise errors.InvalidRequest(f"{message}; change the prompt", field="input")
        end = _REASONS.get(reason) if isinstance(reason, str) else None
        if end is None:
            shown = quoted(reason) if isinstance(reason, str) else "a value that is no text"
            raise self._lost(f"ended its answer with the reason {shown}")
        self.finished = True
        self._end.reason = end
        if end != pb.FINISH_REASON_STOP or not self._stops:
            return
        matched = choice.get("stop_reason")  # in vLLM and Headrace's gateway
        if matched is None:
            matched = choice.get("matched_stop")  # in SGLang
        if matched is None and reason == "stop_sequence" and len(self._stops) == 1:
            (matched,) = self._stops
        if isinstance(matched, str) and matched in self._stops:
            self._end.reason, self._end.stop_sequence = pb.FINISH_REASON_STOP_SEQUENCE, matched

    def _without_details(self) -> errors.HeadraceError:
        """Return the error for an upstream that ignores that log-probabilities were requested."""
        if self.begun:
            return self._lost("did not send the log-probabilities that were requested")
        return unsupported("sampling.top_logprobs" if self._with_tokens else "sampling.logprobs")

    def _lost(self, what: str) -> errors.HeadraceError:
        """Return the error for an answer that cannot be completed.

        what   the upstream did, such as "sent an event that is not a JSON object"
        """
        message = f"the service behind this tier {what}"
        if self.begun:
            return errors.UpstreamLost(f"{message}; the answer is incomplete")
        return errors.NoWorkers(message, retry_after=0.0)
