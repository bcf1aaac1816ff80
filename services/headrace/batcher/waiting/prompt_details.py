"""Bound the memory of prompt details: log-probabilities of prompt tokens that wait for their readers.

A worker computes a prompt once, so its details cannot wait there for a slow reader, as the tokens of an
answer do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from headrace import errors
from headrace.batcher.job import Job

MAX_BYTES = 256 << 20
# Of one token, and of each of the most likely tokens at its place.
_TOKEN_BYTES, _TOP_BYTES = 128, 8
RETRY_SECONDS = 1.0


def details_bytes(job: Job) -> int:
    """Return the bytes that the details of the job's prompt may take; 0 if there are none."""
    if not job.prompt_offset:
        return 0
    return len(job.prompt_ids) * (_TOKEN_BYTES + _TOP_BYTES * job.sampling.prompt_logprobs)


class PromptDetailsMemory:
    """Counts the bytes of the jobs in flight.

    limit   most bytes of all jobs together; a single one may have more
    """

    def __init__(self, limit: int = MAX_BYTES) -> None:
        self.limit = limit
        self.bytes = 0

    @contextmanager
    def held(self, job: Job) -> Iterator[None]:
        """Count the job's bytes during the block. Raises Overloaded if they exceed the limit."""
        size = details_bytes(job)
        if size and self.bytes and self.bytes + size > self.limit:
            raise errors.Overloaded(
                f"log-probabilities of prompts in flight take up to {self.bytes} bytes, and {size} more "
                f"would exceed {self.limit}; retry after {RETRY_SECONDS:g} s, or ask for fewer "
                "prompt_logprobs",
                retry_after=RETRY_SECONDS,
                limit_bytes=self.limit,
            )
        self.bytes += size
        try:
            yield
        finally:
            self.bytes -= size
