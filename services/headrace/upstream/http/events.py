"""Read an answer from an HTTP response: its events, one after the other, as deltas."""

from __future__ import annotations

import asyncio
import json
import math
import time

from headrace import errors
from headrace.upstream.api.events import AnswerReader
from headrace.upstream.http.session import MAX_BODY_BYTES, Broken, Response, within
from headrace.upstream.http.sse import EventSplitter, EventTooLong
from headrace.v1 import generation_pb2 as pb

STREAM, WHOLE = "text/event-stream", "application/json"
_DONE = b"[DONE]"
# After the reason of the end, for usage and for the end of the stream.
END_SECONDS = 2.0
# For the end of a body that is complete as far as its events say, so that its connection can be used again.
REUSE_SECONDS = 0.1


class AnswerStream:
    """The answer in one response, whose status is 200.

    reader          turns events into deltas
    ended           whether nothing more comes
    first_byte      when the first byte of the body arrived, time.monotonic(); None: not yet
    stall_seconds   how long the upstream may send no event
    """

    def __init__(self, response: Response, reader: AnswerReader, *, stall_seconds: float) -> None:
        self.reader = reader
        self.ended = False
        self.first_byte: float | None = None
        self._response = response
        self._splitter = EventSplitter()
        self._stall_seconds = stall_seconds
        self._ends_at: float | None = None  # once the reason of the end was read; time of the event loop
        self._failure: errors.HeadraceError | None = None  # after the deltas that were returned

    async def begin(self) -> list[pb.Delta]:
        """Wait for the first content, and return the deltas up to there. The caller limits the time.

        Raises what `AnswerReader` does before the answer has begun, and Broken.
        """
        kind = self._response.content_type
        if kind == WHOLE:
            return await self._whole()
        if kind not in (STREAM, ""):
            raise self._fault(f"the response is {kind[:100]!r}, not {STREAM}", retry_after=None)
        deltas: list[pb.Delta] = []
        while not self.reader.begun and not self.ended:
            piece = await self._response.piece()
            if self.first_byte is None:
                self.first_byte = time.monotonic()
            deltas += self._feed(piece)
            if self._failure is not None and not self.reader.begun:
                raise self._failure
        if not self.reader.begun:
            self.reader.finish()  # raises, with the reason
        return deltas

    async def read(self, until: float = math.inf) -> list[pb.Delta]:
        """Return the next deltas after waiting for them; none at the end, and none at *until*.

        until   time of the event loop

        Raises UpstreamLost.
        """
        now = asyncio.get_running_loop().time
        while not self.ended:
            if self._failure is not None:
                raise self._failure
            finished = self.reader.finished
            if finished and self._ends_at is None:
                self._ends_at = now() + END_SECONDS  # whatever arrives until then
            stalled_at = self._ends_at or now() + self._stall_seconds
            try:
                async with asyncio.timeout_at(min(until, stalled_at)):
                    piece = await self._response.piece()
            except TimeoutError:
                if until <= stalled_at:
                    return []
                if not finished:
                    raise _lost(f"it sent nothing for {self._stall_seconds:g} s") from None
                self.ended = True
            except Broken as broken:
                if not finished:
                    raise _lost(str(broken)) from None
                self.ended = True
            else:
                if deltas := self._feed(piece):
                    return deltas
        return []

    async def close(self) -> None:
        """Let a complete response end, so that its connection can be used again."""
        if self.ended and not self._response.complete:
            await within(REUSE_SECONDS, self._response)

    async def _whole(self) -> list[pb.Delta]:
        """Read an answer that is no stream: the upstream ignores `stream`."""
        body = await self._response.body(MAX_BODY_BYTES)
        self.first_byte = time.monotonic()
        if len(body) > MAX_BODY_BYTES:
            raise self._fault(f"the response has more than {MAX_BODY_BYTES} bytes", retry_after=None)
        deltas = self.reader.read(self._parsed(body))
        self.ended = True
        if not self.reader.begun:
            self.reader.finish()  # raises, with the reason
        return deltas

    def _feed(self, piece: bytes) -> list[pb.Delta]:
        """Return the deltas of the next piece of the body; of the end if it is empty.

        An error after deltas is raised by the next read, so that what arrived before it is delivered.
        """
        deltas: list[pb.Delta] = []
        try:
            events = self._splitter.feed(piece) if piece else self._splitter.end()
            for data in events:
                if data.strip() == _DONE:
                    self.ended = True
                    break
                deltas += self.reader.read(self._parsed(data))
        except EventTooLong as error:
            failure: errors.HeadraceError = self._fault(str(error))
        except errors.HeadraceError as error:
            failure = error
        else:
            self.ended = self.ended or not piece
            return deltas
        if self.reader.finished:
            self.ended = True  # what follows the reason of the end may be wrong, the answer is complete
        elif not deltas:
            raise failure
        else:
            self._failure = failure
        return deltas

    def _parsed(self, data: bytes) -> object:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise self._fault("it sent an event that is not JSON") from None

    def _fault(self, message: str, *, retry_after: float | None = 0.0) -> errors.Unavailable:
        """Return the error for a response that violates the API; `retry_after` as in `api.problems`."""
        if self.reader.begun:
            return _lost(message)
        return errors.NoWorkers(message, retry_after=retry_after)


def _lost(message: str) -> errors.UpstreamLost:
    return errors.UpstreamLost(f"the upstream broke off the answer: {message}")
