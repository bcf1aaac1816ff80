"""Record callers' feedback about answers, in memory and optionally in a file.

An answer is identified by its tenant and the request id. Only that tenant may rate it, once. Prompts are
kept, in memory and in the file, only if a file is configured. `headrace calibrate` and `headrace train` read
the rows of the file.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from headrace import errors
from headrace.quoting import quoted
from headrace.router.state.quota import Quota
from headrace.router.state.row_file import RowFile
from headrace.router.state.tenant_memory import TenantMemory

log = logging.getLogger(__name__)

TENANT_SHARE = 0.25  # of the file's size, that one tenant may write within an hour


@dataclass(slots=True)
class AnswerRecord:
    """An answer that its caller may rate.

    score      of the prompt; None if it could not be scored
    prompt     the text that was scored; empty without a file, and if it is too long for the file
    quality    the reported outcome, 0 to 1; None before the report
    kept       whether the outcome is in the file
    ambiguous  another answer without a tenant has the same request id and no outcome
    """

    tier: str
    score: float | None
    prompt: str = ""
    quality: float | None = None
    kept: bool = False
    ambiguous: bool = False


class Feedback:
    """The most recent answers, and the file of outcomes.

    path        of the file, a `RowFile`; None: no file
    max_bytes   of the file
    remembered  number of answers that may still be rated; fewer if their prompts have more than *max_bytes*
                characters in total. Beyond either limit, the tenant with the most loses its oldest
    per_minute  outcomes that one tenant may report
    share       of *max_bytes* that one tenant may write within an hour; None: no limit

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
        self._outcomes = Quota(per_minute, 60.0)
        self._bytes = None if share is None else Quota(max_bytes * share, 3600.0)
        # One thread, so rows are written one after the other, each completely even if its caller leaves.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="feedback")

    def remember(self, request_id: str, answer: AnswerRecord, *, tenant: str = "") -> None:
        """Store an answer to *tenant*'s request; it replaces an older one of the same id."""
        if self._file is None or len(answer.prompt) > self._max_bytes:
            answer.prompt = ""
        before = self._answers.get(tenant, request_id)
        if not tenant and before is not None and before.quality is None:
            # Without a tenant, two prompts under one id may be two callers'.
            answer.ambiguous = before.ambiguous or before.prompt != answer.prompt
        self._answers.put(tenant, request_id, answer, len(answer.prompt))

    def recall(self, request_id: str, *, tenant: str = "") -> AnswerRecord:
        """Return the answer to a request of *tenant*. Raises UnknownRequest."""
        if (answer := self._answers.get(tenant, request_id)) is None:
            raise errors.UnknownRequest(
                f"no request {quoted(request_id)} of {_named(tenant)} among the last "
                f"{self._remembered} that this router answered",
                field="request_id",
            )
        return answer

    async def rate(self, request_id: str, tier: str, quality: float, *, tenant: str = "") -> bool:
        """Record the outcome of an answer; return whether the file has a row about it.

        tier      that gave the answer
        quality   0 to 1
        tenant    of the request

        Raises UnknownRequest; InvalidRequest if another tier answered or the request id is ambiguous;
        AlreadyRated after a different outcome; FeedbackQuota if the tenant has exhausted its quota; and
        InternalError if the file cannot be written.
        """
        answer = self.recall(request_id, tenant=tenant)
        _check_rated(request_id, tier, answer)
        if answer.quality is not None:
            if answer.quality == quality:
                return answer.kept  # a repeated report, for example after a lost reply
            raise errors.AlreadyRated(
                f"request {quoted(request_id)} was rated before, with {answer.quality:g}",
                field="request_id",
            )
        data = self._row(request_id, tenant, answer, quality)
        self._charge(tenant, len(data))
        answer.quality = quality
        if not data or self._file is None:
            return False
        answer.kept = True
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._file.append, data)
        except OSError as error:
            answer.quality, answer.kept = None, False
            log.error("feedback not written", extra={"file": str(self._file.path), "problem": str(error)})
            raise errors.InternalError(
                f"the router cannot write its feedback file ({error.strerror or error}); nothing was recorded"
            ) from error
        return True

    def _row(self, request_id: str, tenant: str, answer: AnswerRecord, quality: float) -> bytes:
        """Return the row for the file; empty without a file or prompt, or if it is too long for the file."""
        if self._file is None or not answer.prompt:
            return b""
        row = {
            "id": request_id,
            "answer": uuid.uuid4().hex,  # callers may use a request id again
            **({"tenant": tenant} if tenant else {}),
            "time": round(time.time(), 3),
            "prompt": answer.prompt,
            **({} if answer.score is None else {"score": round(answer.score, 6)}),
            "tier": answer.tier,
            f"{answer.tier}_ok": quality,
        }
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        return data if len(data) <= self._max_bytes else b""

    def _charge(self, tenant: str, size: int) -> None:
        now = time.monotonic()
        quotas = [(self._outcomes, 1), *([(self._bytes, size)] if self._bytes is not None else [])]
        if (wait := max(quota.wait(tenant, amount, now) for quota, amount in quotas)) > 0:
            raise errors.FeedbackQuota(
                f"{_named(tenant)} exhausted the feedback quota: report this outcome later",
                retry_after=wait,
            )
        for quota, amount in quotas:
            quota.take(tenant, amount, now)


def _check_rated(request_id: str, tier: str, answer: AnswerRecord) -> None:
    """Raise InvalidRequest if another tier gave the answer, or if several answers have this id."""
    if tier != answer.tier:
        raise errors.InvalidRequest(
            f"tier {quoted(tier)} did not answer request {quoted(request_id)}, {answer.tier!r} did",
            field="tier",
        )
    if answer.ambiguous:
        raise errors.InvalidRequest(
            f"several requests without a tenant have the id {quoted(request_id)}: give each request "
            "an id of its own, or none, or set routing.tenant",
            field="request_id",
        )


def _named(tenant: str) -> str:
    return f"tenant {tenant!r}" if tenant else "callers without a tenant"
