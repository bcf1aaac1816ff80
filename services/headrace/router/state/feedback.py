"""Keep what callers say of their answers: which request it was, and, where asked for, on disk.

An answer is known by its tenant and the request's id, and only that tenant may rate it, once. A prompt is
remembered and written only where a file was set for it: prompts are the callers' own. The rows are what
`headrace calibrate` and `headrace train` read.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from headrace import errors
from headrace.router.state.quota import Quota
from headrace.router.state.tenant_memory import Memory

log = logging.getLogger(__name__)

TENANT_SHARE = 0.25  # of the file's size, that one tenant may write within an hour


@dataclass(slots=True)
class Answered:
    """A request that was answered.

    score      of the prompt; None where it could not be scored
    prompt     what was scored; empty where no file is kept, or none that holds it
    id         made here: request ids are the callers' own, and may come again
    quality    its outcome, 0 to 1; None while its caller has reported none
    kept       whether that is on disk
    ambiguous  another answer without a tenant has the same request id, and no outcome either
    """

    tier: str
    score: float | None
    prompt: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    quality: float | None = None
    kept: bool = False
    ambiguous: bool = False


class Feedback:
    """The last requests, and the file for what is said of them.

    path        rows of JSON, one a line; None keeps nothing on disk
    max_bytes   beyond this the file becomes PATH.1, in place of an older one: twice this is the most on disk
    remembered  requests whose outcome may still be reported; fewer, where their prompts have more than
                *max_bytes* characters together. Beyond either bound the tenant that has most loses its oldest
    per_minute  outcomes that one tenant may report
    share       of *max_bytes* that one tenant may write within an hour; None: any

    Raises OSError for a file that cannot be written.
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
        self._answered: Memory[Answered] = Memory(remembered, weight=max_bytes)
        self._outcomes = Quota(per_minute, 60.0)
        self._bytes = None if share is None else Quota(max_bytes * share, 3600.0)
        # One thread, so one row after the other: one that is being written is, though its caller has left.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="feedback")

    def remember(self, request_id: str, answered: Answered, *, tenant: str = "") -> None:
        """Book an answer of *tenant*'s request; an older one is forgotten for it."""
        if self._path is None or len(answered.prompt) > self._max_bytes:
            answered.prompt = ""
        before = self._answered.get(tenant, request_id)
        if not tenant and before is not None and before.quality is None:
            # Who has no tenant may be anybody: two prompts under one id are two callers' for all we know.
            answered.ambiguous = before.ambiguous or before.prompt != answered.prompt
        self._answered.put(tenant, request_id, answered, len(answered.prompt))

    def recall(self, request_id: str, *, tenant: str = "") -> Answered:
        """What is known of a request of *tenant*. Raises UnknownRequest."""
        if (answered := self._answered.get(tenant, request_id)) is None:
            raise errors.UnknownRequest(
                f"no request {errors.quoted(request_id)} of {_named(tenant)} among the last "
                f"{self._remembered} that this router answered",
                field="request_id",
            )
        return answered

    async def keep(self, request_id: str, tier: str, quality: float, *, tenant: str = "") -> bool:
        """Book the outcome of an answer; returns whether there is a row about it in the file.

        tier      that gave the answer
        quality   0 to 1
        tenant    of the request

        Raises UnknownRequest; InvalidRequest where another tier answered, or where it is not known which
        answer is meant; AlreadyRated after another outcome; FeedbackQuota where the tenant has used its quota
        up; and InternalError where the file cannot be written.
        """
        answered = self.recall(request_id, tenant=tenant)
        if tier != answered.tier:
            raise errors.InvalidRequest(
                f"tier {errors.quoted(tier)} did not answer request {errors.quoted(request_id)}, "
                f"{answered.tier!r} did",
                field="tier",
            )
        if answered.ambiguous:
            raise errors.InvalidRequest(
                f"several requests without a tenant have the id {errors.quoted(request_id)}, so it is not "
                "known which is meant: give each request an id of its own, or none, or set routing.tenant",
                field="request_id",
            )
        if answered.quality is not None:
            if answered.quality == quality:
                return answered.kept  # reported again, as by a caller that lost the reply
            raise errors.AlreadyRated(
                f"request {errors.quoted(request_id)} was rated before, with {answered.quality:g}",
                field="request_id",
            )
        data = self._row(request_id, tenant, answered, quality)
        self._charge(tenant, len(data))
        answered.quality = quality
        if not data or self._path is None:
            return False
        answered.kept = True
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._write, self._path, data)
        except OSError as error:
            answered.quality, answered.kept = None, False
            log.error("feedback not kept", extra={"file": str(self._path), "problem": str(error)})
            raise errors.InternalError(
                f"the router cannot write its file of feedback ({error.strerror or error}); nothing was kept"
            ) from error
        return True

    def _row(self, request_id: str, tenant: str, answered: Answered, quality: float) -> bytes:
        """What goes on disk; nothing where there is no file, or none that holds it."""
        if self._path is None or not answered.prompt:
            return b""
        row = {
            "id": request_id,
            "answer": answered.id,
            **({"tenant": tenant} if tenant else {}),
            "time": round(time.time(), 3),
            "prompt": answered.prompt,
            **({} if answered.score is None else {"score": round(answered.score, 6)}),
            "tier": answered.tier,
            f"{answered.tier}_ok": quality,
        }
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        return data if len(data) <= self._max_bytes else b""

    def _charge(self, tenant: str, size: int) -> None:
        now = time.monotonic()
        quotas = [(self._outcomes, 1), *([(self._bytes, size)] if self._bytes is not None else [])]
        if (wait := max(quota.wait(tenant, amount, now) for quota, amount in quotas)) > 0:
            raise errors.FeedbackQuota(
                f"the quota of feedback of {_named(tenant)} is used up: report this outcome later",
                retry_after=wait,
            )
        for quota, amount in quotas:
            quota.take(tenant, amount, now)

    def _write(self, path: Path, line: bytes) -> None:
        if not self._append(path, line):
            os.replace(path, path.with_name(path.name + ".1"))
            self._append(path, line)

    def _append(self, path: Path, line: bytes) -> bool:
        """Whether there was room for the row: then it is written."""
        handle = _open(path)
        try:
            size = os.fstat(handle).st_size
            if size + len(line) > self._max_bytes:
                return False
            if os.write(handle, line) < len(line):
                # Half a row would spoil the next one, too, and the file for whoever reads it.
                os.ftruncate(handle, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return True
        finally:
            os.close(handle)


def _named(tenant: str) -> str:
    return f"tenant {tenant!r}" if tenant else "callers without a tenant"


def _open(path: Path) -> int:
    # Readable by its owner alone: it holds what callers wrote.
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
