"""Keep what is known of all answers of a request: who answers, tokens and cost."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.metadata import version

from headrace.v1 import generation_pb2 as pb

FINISH_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_STOP_SEQUENCE: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}


@dataclass
class Tally:
    """What is known of the answers of a request.

    choices    the number of answers
    n          answers per prompt
    accepted   of the answers that have begun, by the index of the choice
    finished   of the answers that have ended
    """

    choices: int
    n: int = 1
    accepted: dict[int, pb.Accepted] = field(default_factory=dict)
    finished: dict[int, pb.Finish] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all answers have ended."""
        return len(self.finished) == self.choices

    @property
    def first(self) -> pb.Accepted:
        """The first answer that has begun."""
        return next(iter(self.accepted.values()))

    def usage(self) -> dict[str, object]:
        """Return the usage of all answers. A prompt counts once, however many choices it has."""
        firsts = [finish.usage for index, finish in self.finished.items() if index % self.n == 0]
        prompt = sum(usage.prompt_tokens for usage in firsts)
        completion = sum(finish.usage.completion_tokens for finish in self.finished.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)},
        }

    def cost(self) -> float | None:
        """Return the cost of all answers; None if that of any is unknown."""
        bills = [finish.bill for finish in self.finished.values()]
        if not bills or not all(bill.HasField("cost") for bill in bills):
            return None
        return sum(bill.cost for bill in bills)

    def headrace(self) -> dict[str, object]:
        """Return what the mesh knows about the answers, and OpenAI's API has no place for."""
        first = self.first
        facts: dict[str, object] = {
            "tier": first.tier,
            "score": first.score if first.HasField("score") else None,
            "cost": self.cost(),
            "request_id": first.request_id,
            "answer_id": first.answer_id,
        }
        if self.choices > 1:
            facts["answer_ids"] = [self.accepted[index].answer_id for index in sorted(self.accepted)]
        return facts

    def headers(self) -> dict[str, str]:
        """Return the response headers that are known once an answer has begun."""
        first = self.first
        given = {
            "x-headrace-tier": _printable(first.tier),
            "x-headrace-model": _printable(first.model),
            "x-headrace-request-id": _printable(first.request_id),
            "x-request-id": _printable(first.request_id),  # which SDKs of OpenAI keep
        }
        if first.HasField("score"):
            given["x-headrace-score"] = f"{first.score:.4f}"
        return given

    def cost_header(self) -> dict[str, str]:
        """Return the response header with the cost, if it is known."""
        cost = self.cost()
        return {} if cost is None else {"x-headrace-cost": f"{cost:.10g}"}


def head(id: str, kind: str, created: int, accepted: pb.Accepted) -> dict[str, object]:
    """Return what a response and each of its chunks begins with.

    kind      `object` in OpenAI's API, such as "chat.completion"
    created   seconds since 1970
    """
    return {
        "id": id,
        "object": kind,
        "created": created,
        "model": accepted.model,
        "system_fingerprint": fingerprint(accepted.tier, accepted.model),
    }


def ending(finish: pb.Finish, *, calls: bool = False) -> dict[str, object]:
    """Return why an answer ended: OpenAI's reason, and the stop text as in vLLM.

    calls   whether the model has decided to call tools, which is a reason to stop
    """
    stopped = calls and finish.reason == pb.FINISH_REASON_STOP
    return {
        "finish_reason": "tool_calls" if stopped else FINISH_REASONS.get(finish.reason, "stop"),
        "stop_reason": finish.stop_sequence or None,
    }


@lru_cache(maxsize=1024)
def fingerprint(tier: str, model: str) -> str:
    """Return OpenAI's `system_fingerprint`: another tier, model or version of Headrace has another one."""
    text = "\n".join((_version(), tier, model))
    return f"fp_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@cache
def _version() -> str:
    return version("headrace")


def _printable(text: str) -> str:
    """Return *text* as the value of a header: names of tiers and models may have any characters."""
    return text.encode("ascii", "backslashreplace").decode().replace("\r", " ").replace("\n", " ")
