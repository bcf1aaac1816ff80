"""Match reported outcomes to answers, and write them to a file for `headrace train` and `calibrate`.

A report names an answer by the id that the router made for it, which nobody can guess. Ids of requests are
chosen by callers, so one that several answers have is rejected. Only the tenant of a request can rate its
answer, once, and only for the tier that answered. Nobody displaces the answers of other tenants or floods
the file: each tenant has a quota, and callers without credentials, who can invent tenants, have one together.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace import errors
from headrace.quoting import quoted
from headrace.router.state.quota import Quota
from headrace.router.state.row_file import RowFile
from headrace.router.state.tenant_memory import TenantMemory
from headrace.routing.scoring.conversation import Turn, row_of
from headrace.runtime.security.identity import ANONYMOUS, Identity

log = logging.getLogger(__name__)

TENANT_SHARE = 0.25  # of the file's size, that one tenant may write within an hour
JUDGE_SHARE = 0.25  # of the file's size, that judges may write within an hour
_TOGETHER = 4  # quotas of tenants that callers without credentials share for reports per minute
_TOGETHER_BYTES = 2  # and for bytes per hour
MAX_CHARACTERS = 262_144  # of the turns of one answer; longer ones are not stored
_TURN_CHARACTERS = 64  # that a stored turn counts in addition to its text
_SAME_REQUEST = 8  # the latest answers to one request id among which a report finds its own


@dataclass(slots=True)
class AnswerRecord:
    """An answer that its caller may rate.

    answer_id    made by the router
    request_id   chosen by the caller, or made by a server
    score        of the turns; None if they could not be scored
    turns        that were scored; empty without a file, and if they are too long for it
    scorer, arm  that scored them: its fingerprint, and "canary" for a candidate
    quality      the reported outcome, 0 to 1; None before the report
    kept         whether the outcome is in the file
    asked        digest of the prompt, which tells prompts apart if they are not kept; 0: that of the turns
    """

    answer_id: str
    request_id: str
    tier: str
    score: float | None
    turns: Sequence[Turn] = ()
    scorer: str = ""
    arm: str = ""
    quality: float | None = None
    kept: bool = False
    asked: int = 0

    @property
    def size(self) -> int:
        """Characters of the turns, and what each of them costs."""
        return sum(len(turn.text) + _TURN_CHARACTERS for turn in self.turns)

    def row(self, tenant: str, source: str) -> dict[str, Any]:
        """Return the fields of a row about it, without an outcome.

        source   of the outcome: "caller" or "judge"
        """
        return {
            "id": self.request_id,
            "answer": self.answer_id,
            **({"tenant": tenant} if tenant else {}),
            "source": source,
            "time": round(time.time(), 3),
            **row_of(self.turns),
            **({} if self.score is None else {"score": round(self.score, 6)}),
            **({"scorer": self.scorer} if self.scorer else {}),
            **({"arm": self.arm} if self.arm else {}),
            "tier": self.tier,
        }


class Feedback:
    """The most recent answers, and the file of outcomes.

    path        of the file, a `RowFile`; None: no file
    max_bytes   of the file
    remembered  number of answers that may still be rated; fewer if their turns have more than *max_bytes*
                characters in total. Beyond either limit, the tenant with the most loses its oldest
    per_minute  outcomes that one tenant may report; callers without credentials, four times as many together
    share       of *max_bytes* that one tenant may write within an hour; callers without credentials, twice
                that together; None: no limit

    Raises OSError if the file cannot be written.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        max_bytes: int = 64 * 1024 * 1024,
        remembered: int = 10_000,
        per_minute: int = 600,
        share: float | None = None,
    ) -> None:
        self._file = None if path is None else RowFile(path, max_bytes=max_bytes)
        self._max_bytes = max_bytes
        self._remembered = remembered
        self._answers: TenantMemory[AnswerRecord] = TenantMemory(remembered, weight=max_bytes)
        self._of_request: TenantMemory[tuple[str, ...]] = TenantMemory(remembered)  # ids of answers
        self._outcomes = Quota(per_minute, 60.0)
        self._together = Quota(per_minute * _TOGETHER, 60.0, tenants=1)
        self._bytes = self._bytes_together = None
        if share is not None:
            self._bytes = Quota(max_bytes * share, 3600.0)
            self._bytes_together = Quota(max_bytes * min(share * _TOGETHER_BYTES, 1.0), 3600.0, tenants=1)
        self._judged = Quota(max_bytes * JUDGE_SHARE, 3600.0, tenants=1)
        # One thread, so rows are written one after the other, each completely even if its caller leaves.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="feedback")

    def remember(self, answer: AnswerRecord, *, tenant: str = "") -> None:
        """Store an answer to *tenant*'s request."""
        answer.asked = answer.asked or hash(tuple(answer.turns))
        if self._file is None or answer.size > min(self._max_bytes, MAX_CHARACTERS):
            answer.turns = ()
        self._answers.put(tenant, answer.answer_id, answer, answer.size)
        # The same tier and prompt again, as after a retry, replace the earlier answer to the request.
        others = [
            one.answer_id
            for one in self._answers_to(answer.request_id, tenant)
            if one.quality is not None or (one.tier, one.asked) != (answer.tier, answer.asked)
        ]
        named = (*others[-_SAME_REQUEST + 1 :], answer.answer_id)
        self._of_request.put(tenant, answer.request_id, named)

    def recall(self, *, answer_id: str = "", request_id: str = "", tenant: str = "") -> AnswerRecord:
        """Return an answer to *tenant*, by its own id, by its request's id, or by both.

        Raises UnknownRequest, and InvalidRequest if the request id is another answer's, or several answers'.
        """
        if not answer_id:
            return self._only_answer(request_id, tenant)
        if (answer := self._answers.get(tenant, answer_id)) is None:
            raise self._unknown("answer", answer_id, tenant)
        if request_id and request_id != answer.request_id:
            raise errors.InvalidRequest(
                f"answer {quoted(answer_id)} is not to request {quoted(request_id)}: leave request_id out",
                field="request_id",
            )
        return answer

    def _only_answer(self, request_id: str, tenant: str) -> AnswerRecord:
        """Return the answer that a request id means: the one without an outcome, or else the last one."""
        if not (found := self._answers_to(request_id, tenant)):
            raise self._unknown("request", request_id, tenant)
        unrated = [answer for answer in found if answer.quality is None]
        if len(unrated) > 1:
            raise ambiguous(request_id, tenant)
        return (unrated or found)[-1]

    def has_unrated(self, request_id: str, tenant: str) -> bool:
        """Whether an answer to a request id has no outcome."""
        return any(answer.quality is None for answer in self._answers_to(request_id, tenant))

    def _answers_to(self, request_id: str, tenant: str) -> list[AnswerRecord]:
        """Return the last answers to a request id, oldest first."""
        names = self._of_request.get(tenant, request_id) or ()
        found = (self._answers.get(tenant, name) for name in names)
        return [answer for answer in found if answer is not None]

    def _unknown(self, what: str, name: str, tenant: str) -> errors.UnknownRequest:
        return errors.UnknownRequest(
            f"no {what} {quoted(name)} of {_named(tenant)} among the last "
            f"{self._remembered} that this router answered",
            field=f"{what}_id",
        )

    async def rate(
        self,
        answer: AnswerRecord,
        tier: str,
        quality: float,
        *,
        tenant: str = "",
        rater: Identity = ANONYMOUS,
    ) -> bool:
        """Record the outcome of an answer; return whether the file has a row about it.

        answer    of *tenant*, as `recall` returns it
        tier      that gave the answer
        quality   0 to 1
        rater     who reports it

        Raises InvalidRequest if another tier answered; AlreadyRated after a different outcome; FeedbackQuota
        if the tenant has exhausted its quota; and InternalError if the file cannot be written.
        """
        if tier != answer.tier:
            raise errors.InvalidRequest(
                f"tier {quoted(tier)} did not give answer {quoted(answer.answer_id)}, {answer.tier!r} did",
                field="tier",
            )
        if answer.quality is not None:
            if answer.quality == quality:
                return answer.kept  # a repeated report, for example after a lost reply
            raise errors.AlreadyRated(
                f"answer {quoted(answer.answer_id)} was rated before, with {answer.quality:g}",
                field="answer_id",
            )
        data = b""
        if self._file is not None and answer.turns:
            outcome = {"identity": rater.name, f"{answer.tier}_ok": quality}
            data = self._data(answer.row(tenant, "caller") | outcome)
        self._charge(tenant, rater, len(data))
        answer.quality = quality
        if not data or self._file is None:
            return False
        answer.kept = True
        try:
            await self._append(self._file, data)
        except OSError as error:
            answer.quality, answer.kept = None, False
            log.error("feedback not written", extra={"file": str(self._file.path), "problem": str(error)})
            raise errors.InternalError(
                f"the router cannot write its feedback file ({error.strerror or error}); nothing was recorded"
            ) from error
        return True

    async def keep_judged(
        self, answer: AnswerRecord, outcome: Mapping[str, object], *, tenant: str = ""
    ) -> bool:
        """Write what a judge found about an answer; return whether the file has a row about it.

        outcome   the fields of the row that describe it

        A row is left out if the judges have exhausted their quota, or if the file cannot be written.
        """
        if self._file is None or not answer.turns or answer.size > min(self._max_bytes, MAX_CHARACTERS):
            return False
        data, now = self._data(answer.row(tenant, "judge") | dict(outcome)), time.monotonic()
        if not data or self._judged.wait("", len(data), now) > 0:
            return False
        self._judged.take("", len(data), now)
        try:
            await self._append(self._file, data)
        except OSError as error:
            log.error("verdict not written", extra={"file": str(self._file.path), "problem": str(error)})
            return False
        return True

    async def _append(self, file: RowFile, data: bytes) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writer, file.append, data)

    def _data(self, row: Mapping[str, object]) -> bytes:
        """Return a line of the file; empty if it is too long for the file."""
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        return data if len(data) <= self._max_bytes else b""

    def _charge(self, tenant: str, rater: Identity, size: int) -> None:
        """Take one outcome and its bytes from the quotas. Raises FeedbackQuota if one is exhausted."""
        now = time.monotonic()
        quotas = [(self._outcomes, tenant, 1), (self._bytes, tenant, size)]
        if rater == ANONYMOUS:
            quotas += [(self._together, "", 1), (self._bytes_together, "", size)]
        limits = [(quota, whose, amount) for quota, whose, amount in quotas if quota is not None]
        wait, whose = max((quota.wait(whose, amount, now), whose) for quota, whose, amount in limits)
        if wait > 0:
            who = _named(tenant) if whose == tenant else "callers without credentials together"
            raise errors.FeedbackQuota(
                f"{who} exhausted the feedback quota: report this outcome later", retry_after=wait
            )
        for quota, whose, amount in limits:
            quota.take(whose, amount, now)


def ambiguous(request_id: str, tenant: str) -> errors.InvalidRequest:
    """Return the error for a request id that means several answers."""
    return errors.InvalidRequest(
        f"several answers of {_named(tenant)} have the request id {quoted(request_id)}: name the one that is "
        "meant by its answer_id, which `accepted` contains",
        field="answer_id",
    )


def _named(tenant: str) -> str:
    return f"tenant {tenant!r}" if tenant else "callers without a tenant"
