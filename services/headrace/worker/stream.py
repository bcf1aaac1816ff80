"""One batcher's stream: its in-flight sequences, the credit it was granted, and its unsent messages.

If the batcher reads slowly, step frames are merged, so the engine never waits. The bytes that are kept for a
stream are bounded; a stream beyond the bound fails. Log-probabilities of the most likely tokens take many
times as much as tokens: they have a bound of their own, a frame contains a limited part of them, and those of
prompts are reserved before a sequence is admitted. Plain data, except for the events that resume its writer
and end it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass, field

from headrace import errors
from headrace.v1 import worker_service_pb2 as wire
from headrace.worker.flow.credit import CreditState
from headrace.worker.runner import SequenceSpec, SequenceUpdate
from headrace.worker.sequences import (
    InFlightSequence,
    SequenceKey,
    append_top,
    conclude,
    prompt_bytes,
    top_bytes,
    wire_parts,
)

# How often an empty step is sent while prompts are computed and there are no tokens to send.
HEARTBEAT_SECONDS = 0.25
# A batcher whose sequences all end at once is still backlogged: the next ones are on their way.
BACKLOGGED_SECONDS = 1.0
# Batchers ping each second. Credit that a batcher has not used is reserved only while it sends messages.
SILENT_SECONDS = 3.0
# A stream that has no sequences and has submitted none for this long gets no reserve of credit.
IDLE_SECONDS = 10.0
# Most bytes that are kept for a batcher that does not read. A batcher that still answers pings leaves far
# less unread: this is more than 100,000 tokens.
UNREAD_BYTES = 1 << 20
# The same for the most likely tokens: 70,000 tokens with 20 each. All of them fit in one message.
UNREAD_TOP_BYTES = 12 << 20
# Most bytes of prompts' log-probabilities that are reserved for a stream with several such sequences.
PROMPT_BYTES = 16 << 20
# Most bytes of log-probabilities in a frame, unless one delta has more: tokens of other sequences wait for a
# frame that is being read.
FRAME_BYTES = 64 << 10
_DELTA_BYTES = 128  # of a delta, besides its tokens
# A newer message of these kinds replaces an unsent one.
_REPLACEABLE = frozenset({"credit", "load", "pong"})


@dataclass(slots=True)
class BatcherStream:
    """One batcher's stream.

    number          identifies the stream in this worker
    window          most step frames that may be unacknowledged; 0 for no bound
    acks_credit     whether the batcher acknowledges credit
    credit          sequences that it may have here, as last granted; generation counts the grants
    last_received   time.monotonic() of the last message from the batcher
    last_submitted  time.monotonic() of the last submit
    done            no more submits will come: the batcher has quiesced or half-closed
    half_closed     no more messages will come at all
    error           why the stream must end; set once, by `fail`
    pending         sequences with an unsent delta, by handle; updates of later steps are merged into it
    priorities      sum of the priorities of the in-flight sequences
    each_step       number of in-flight sequences whose tokens are sent after each step
    others          unsent messages that are not steps
    frames, acked   step frames sent, and acknowledged
    sending         whether the writer is sending
    """

    number: int
    batcher_id: str = ""
    epoch: int = 0
    window: int = 0
    acks_credit: bool = False
    credit: int = 0
    generation: int = 0
    last_received: float = field(default_factory=time.monotonic)
    last_submitted: float = -math.inf
    done: bool = False
    half_closed: bool = False
    error: errors.HeadraceError | None = None
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    in_flight: dict[int, InFlightSequence] = field(default_factory=dict)
    priorities: int = 0
    each_step: int = 0
    pending: dict[int, InFlightSequence] = field(default_factory=dict)
    others: list[wire.RunResponse] = field(default_factory=list)
    has_unsent: asyncio.Event = field(default_factory=asyncio.Event)
    frames: int = 0
    acked: int = 0
    sending: bool = False
    _heartbeat_due: bool = False
    _last_frame: float = 0.0
    _last_backlogged: float = 0.0
    _most_granted: int = 0
    _ended: set[int] = field(default_factory=set)  # handles whose last delta is unsent
    _places: dict[str, int] = field(default_factory=dict)  # in `others`, of messages that may be replaced
    _others_bytes: int = 0
    _pending_bytes: int = 0
    _top_bytes: int = 0
    _reserved: int = 0  # bytes for the log-probabilities of prompts
    _bounded: bool = False  # whether unsent deltas have log-probabilities of prompts or of most likely tokens
    # Grants as (generation, credit): the last one that the batcher acknowledged, and all since.
    _grants: deque[tuple[int, int]] = field(default_factory=lambda: deque([(0, 0)]))

    @property
    def held(self) -> int:
        """Number of sequences that are here as the batcher sees it: until their last deltas are sent."""
        return len(self.in_flight) + len(self._ended)

    @property
    def credit_limit(self) -> int:
        """Most sequences that the batcher may have here, given the grants that it has not acknowledged.

        Without acknowledgements, it is unknown which grants the batcher has received: the limit is then the
        largest one.
        """
        return self._most_unacknowledged if self.acks_credit else self._most_granted

    @property
    def _most_unacknowledged(self) -> int:
        return max(credit for _, credit in self._grants)

    @property
    def unread_bytes(self) -> int:
        """Approximate number of unsent bytes, without those of prompts and of most likely tokens."""
        return self._others_bytes + self._pending_bytes

    def in_use(self, handle: int) -> bool:
        """Whether a handle is in use, as the batcher sees it."""
        return handle in self.in_flight or handle in self._ended

    def credit_state(self, now: float) -> CreditState:
        """Return the stream's state, as credit is shared by it."""
        held = len(self.in_flight)
        if self.done:
            return CreditState(held, self.credit, held, backlogged=False, idle=True)
        if held >= self.credit:
            self._last_backlogged = now
        reserved = self._most_unacknowledged if now - self.last_received < SILENT_SECONDS else 0
        idle = not held and now - self.last_submitted >= IDLE_SECONDS
        backlogged = not idle and now - self._last_backlogged < BACKLOGGED_SECONDS
        return CreditState(held, self.credit, max(held, reserved), backlogged, idle)

    def fail(self, error: errors.HeadraceError) -> None:
        """End the stream with *error*; does nothing if it has failed already."""
        if self.error is None:
            self.error = error
            self.failed.set()

    def grant(self, credit: int) -> None:
        """Send the batcher its credit, if it has changed."""
        if credit == self.credit and self.generation:
            return
        self.credit = credit
        self._most_granted = max(self._most_granted, credit)
        self.generation += 1
        if not self.acks_credit:
            self._grants.clear()
        self._grants.append((self.generation, credit))
        self.send(wire.RunResponse(credit=wire.Credit(generation=self.generation, sequences=credit)))

    def acknowledge_credit(self, generation: int) -> bool:
        """Record that the batcher has received a grant. Returns whether that was unknown before."""
        before = len(self._grants)
        while len(self._grants) > 1 and self._grants[1][0] <= generation:
            self._grants.popleft()
        return len(self._grants) < before

    def send_first(self, response: wire.RunResponse) -> None:
        """Send a message ahead of all unsent ones: the welcome."""
        self.others.insert(0, response)
        self.has_unsent.set()

    def send(self, response: wire.RunResponse) -> None:
        """Send a message that is not a step; an unsent credit, load or pong is replaced by the new one."""
        kind = response.WhichOneof("message") or ""
        place = self._places.get(kind, len(self.others)) if kind in _REPLACEABLE else len(self.others)
        if place < len(self.others) and self.others[place].WhichOneof("message") == kind:
            self.others[place] = response
        else:
            self._places[kind] = len(self.others)
            self.others.append(response)
            self._others_bytes += response.ByteSize()
            self._check_unread()
        self.has_unsent.set()

    def check_room(self, spec: SequenceSpec[SequenceKey]) -> None:
        """Raise Overloaded if the log-probabilities of the sequence's prompt might take too much memory.

        Whatever a batcher reads, the engine does not wait for it. So memory is reserved for all of them. One
        sequence alone is always admitted.
        """
        if self._reserved and self._reserved + prompt_bytes(spec) > PROMPT_BYTES:
            raise errors.Overloaded(
                "too many sequences with prompt_logprobs are at the worker: wait until some have ended",
                retry_after=1.0,
            )

    def add_sequence(self, handle: int, sequence: InFlightSequence) -> None:
        """Add a submitted sequence."""
        self.in_flight[handle] = sequence
        self.priorities += sequence.priority
        self.each_step += sequence.each_step
        sequence.reserved = prompt_bytes(sequence.spec)
        self._reserved += sequence.reserved

    def add_update(self, update: SequenceUpdate[SequenceKey], ended_ns: int) -> None:
        """Add an update to the sequence's unsent delta. Called for each token, and `announce` after a step's.

        ended_ns   time.time_ns() at the end of the step; 0 if the update is of no step
        """
        handle = update.key[1]
        sequence = self.in_flight[handle]
        if handle not in self.pending:
            self.pending[handle] = sequence
            sequence.offset = update.offset
            self._pending_bytes += _DELTA_BYTES
        token_ids = update.token_ids
        sequence.unsent += token_ids
        sequence.answered = update.offset + len(token_ids)
        self._pending_bytes += 4 * (len(token_ids) + len(update.logprobs))
        if token_ids and not sequence.first_token_ns:
            sequence.first_token_ns = ended_ns
            sequence.rare_fields().cached_tokens = update.cached
        if update.logprobs:
            sequence.rare_fields().logprobs.extend(update.logprobs)
        if update.top:
            append_top(sequence.rare_fields().top.add, update.top)
            self._top_bytes += len(update.top) * top_bytes(sequence.spec.params.top_logprobs)
            self._bounded = True
        if update.prompt is not None:
            sequence.parts.extend(wire_parts(update.prompt))
            self._bounded = True
        if update.finish is not None:
            del self.in_flight[handle]
            self.priorities -= sequence.priority
            self.each_step -= sequence.each_step
            self._ended.add(handle)
            rare = sequence.rare_fields()
            conclude(rare, update, sequence, ended_ns or time.time_ns())
            self._pending_bytes += rare.error.ByteSize()

    def announce(self, now: float, *, stepped: bool) -> None:
        """Let the writer send what was added, or an empty frame after a step if none was sent for a while."""
        if self.pending:
            self._check_unread()
        elif stepped and self.in_flight and now - self._last_frame >= HEARTBEAT_SECONDS:
            self._heartbeat_due = True
        else:
            return
        if not self._window_full:
            self.has_unsent.set()

    def acknowledge_frames(self, frame: int) -> None:
        """Record that the batcher has processed all frames up to *frame*."""
        self.acked = max(self.acked, min(frame, self.frames))
        if self.pending or self._heartbeat_due:
            self.has_unsent.set()

    def half_close(self) -> None:
        """Record that the batcher has half-closed: without further acks, the window no longer applies."""
        self.done = self.half_closed = True
        self.window = 0
        self.has_unsent.set()

    @property
    def complete(self) -> bool:
        """Whether the batcher has half-closed and everything is sent."""
        return self.half_closed and not (self.in_flight or self.pending or self.others)

    @property
    def has_unfinished_output(self) -> bool:
        """Whether messages are unsent or being sent."""
        return bool(self.pending or self.others or self.sending)

    def _check_unread(self) -> None:
        for unread, most in ((self.unread_bytes, UNREAD_BYTES), (self._top_bytes, UNREAD_TOP_BYTES)):
            if unread > most:
                self.fail(errors.SlowReader(f"more than {most} bytes are unread on this stream: read faster"))

    def take_messages(self, now: float) -> list[wire.RunResponse]:
        """Remove and return all messages that may be sent now, as few as possible."""
        self.has_unsent.clear()
        responses, self.others = self.others, []
        self._others_bytes = 0
        self._places.clear()
        if (self.pending or self._heartbeat_due) and not self._window_full:
            self.frames += 1
            self._last_frame = now
            self._heartbeat_due = False
            responses.append(self._bounded_frame() if self._bounded else self._frame())
            if self.pending and not self._window_full:
                self.has_unsent.set()
        return responses

    @property
    def _window_full(self) -> bool:
        return bool(self.window) and self.frames - self.acked >= self.window

    def _frame(self) -> wire.RunResponse:
        """Return the next frame, with all that is unsent."""
        response = wire.RunResponse()
        response.step.frame = self.frames
        self._release(self.pending)
        _add_deltas(response.step, self.pending)
        self.pending.clear()
        self._pending_bytes = 0
        self._ended.clear()
        return response

    def _bounded_frame(self) -> wire.RunResponse:
        """Return the next frame, with about FRAME_BYTES of log-probabilities.

        Sequences without any are complete in it. The others take turns: those that it does not reach come
        first in the next frame.
        """
        response = wire.RunResponse()
        step = response.step
        step.frame = self.frames
        room = FRAME_BYTES
        complete: dict[int, InFlightSequence] = {}
        unreached: dict[int, InFlightSequence] = {}
        continued: dict[int, InFlightSequence] = {}
        for handle, sequence in self.pending.items():
            parts, top = sequence.parts, _unsent_top_bytes(sequence)
            if not (parts or top):
                complete[handle] = sequence
            elif room <= 0:
                unreached[handle] = sequence
            else:
                while parts and room > 0:
                    part = parts.popleft()
                    room -= part.ByteSize()
                    step.deltas.add(
                        handle=handle, attempt=sequence.attempt, offset=sequence.offset, prompt=part
                    )
                # One delta with more than a whole frame is sent nevertheless.
                if parts or (top > room and room < FRAME_BYTES):
                    continued[handle] = sequence
                else:
                    room -= top
                    complete[handle] = sequence
        self._release(complete)
        _add_deltas(step, {handle: one for handle, one in complete.items() if one.unsent or one.rare})
        self._ended -= complete.keys()
        self.pending = unreached | continued
        self._bounded = bool(self.pending)
        self._pending_bytes = sum(_DELTA_BYTES + 4 * len(one.unsent) for one in self.pending.values())
        self._top_bytes = sum(map(_unsent_top_bytes, self.pending.values()))
        return response

    def _release(self, sequences: dict[int, InFlightSequence]) -> None:
        """Release what is reserved for sequences whose unsent deltas are about to be sent."""
        if not self._reserved:
            return
        for handle, sequence in sequences.items():
            # No part of the prompt follows the first token or the end.
            if sequence.reserved and (sequence.unsent or handle in self._ended):
                self._reserved -= sequence.reserved
                sequence.reserved = 0


def _add_deltas(step: wire.Step, sequences: dict[int, InFlightSequence]) -> None:
    """Add the unsent deltas of sequences, without parts of their prompts, to a frame."""
    add = step.deltas.add
    # Deltas are made in place, field by field: with keyword arguments, and copied, they take three times as
    # long.
    for handle, sequence in sequences.items():
        delta = add()
        delta.handle = handle
        delta.attempt = sequence.attempt
        delta.offset = sequence.offset
        delta.token_ids.extend(sequence.unsent)
        sequence.unsent.clear()
        if sequence.rare is not None:
            delta.MergeFrom(sequence.rare)
            sequence.rare = None


def _unsent_top_bytes(sequence: InFlightSequence) -> int:
    most = sequence.spec.params.top_logprobs
    return len(sequence.rare.top) * top_bytes(most) if most and sequence.rare is not None else 0
