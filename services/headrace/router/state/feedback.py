"""Record callers' feedback about answers, in memory and optionally in a file.

An answer is identified by its tenant and the request id. Only that tenant may rate it, once. Prompts are
kept, in memory and in the file, only if a file is configured. `headrace calibrate` and `headrace train` read
the rows of the file.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from headrace import errors
from headrace.quoting import quoted
from headrace.router.state.quota import Quota
from headrace.router.state.tenant_memory import TenantMemory

if sys.platform != "win32":
    import fcntl

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

    path        of the file, one JSON object per line; None: no file
    max_bytes   of the file. A full file is renamed to PATH.1, which replaces an older one, so the disk usage
                is at most twice this
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
        if path is not None:
            os.close(_open(path))
        self._path = path
        self._max_bytes = max_bytes
        self._remembered = remembered
        self._answers: TenantMemory[AnswerRecord] = TenantMemory(remembered, weight=max_bytes)
        self._outcomes = Quota(per_minute, 60.0)
        self._bytes = None if share is None else Quota(max_bytes * share, 3600.0)
        # One thread, so rows are written one after the other, each completely even if its caller leaves.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="feedback")

    def remember(self, request_id: str, answer: AnswerRecord, *, tenant: str = "") -> None:
        """Store an answer to *tenant*'s request; it replaces an older one of the same id."""
        if self._path is None or len(answer.prompt) > self._max_bytes:
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
        if not data or self._path is None:
            return False
        answer.kept = True
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._write, self._path, data)
        except OSError as error:
            answer.quality, answer.kept = None, False
            log.error("feedback not written", extra={"file": str(self._path), "problem": str(error)})
            raise errors.InternalError(
                f"the router cannot write its feedback file ({error.strerror or error}); nothing was recorded"
            ) from error
        return True

    def _row(self, request_id: str, tenant: str, answer: AnswerRecord, quality: float) -> bytes:
        """Return the row for the file; empty without a file or prompt, or if it is too long for the file."""
        if self._path is None or not answer.prompt:
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

    def _write(self, path: Path, line: bytes) -> None:
        while not self._append(path, line):
            pass  # the file was rotated, and an empty one has space: `_row` makes no longer row

    def _append(self, path: Path, line: bytes) -> bool:
        """Write the row, or rotate the file if it is full; return whether the row is in the file.

        The file is locked: other processes of the router may write to it and rotate it.
        """
        handle = _open(path)
        try:
            _lock(handle)
            if not _is_at(path, handle):
                return False  # another process has rotated it
            size = os.fstat(handle).st_size
            if size + len(line) > self._max_bytes:
                os.replace(path, path.with_name(path.name + ".1"))
                return False
            if os.write(handle, line) < len(line):
                # A partial row would also corrupt the next one.
                os.ftruncate(handle, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return True
        finally:
            os.close(handle)


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


def _open(path: Path) -> int:
    # Readable by its owner only, because it contains callers' prompts.
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def _lock(handle: int) -> None:
    """Wait until no other process has locked the file, and lock it until it is closed."""
    if sys.platform != "win32":  # where a router has one process
        fcntl.flock(handle, fcntl.LOCK_EX)


def _is_at(path: Path, handle: int) -> bool:
    """Return whether an open file is still the one at *path*."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
